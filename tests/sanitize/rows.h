// Every product and selection on sparse rows; ends the process where a result is wrong.
#pragma once

void check_all_rows();
