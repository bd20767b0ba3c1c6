// Every product with int8 values; ends the process where a result is wrong.
#pragma once

void check_all_int8();
