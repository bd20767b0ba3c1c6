// Every product of a convolution; ends the process where a result is wrong.
#pragma once

void check_all_convolutions();
