// Every product of sparse rows with a sparse weight; ends the process where a result is wrong.
#pragma once

void check_all_sparse_rows();
