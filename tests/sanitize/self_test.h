// Mistakes made on purpose: each must end the program, or the checkers check nothing.
#pragma once

#include <string>

// Makes the mistake of this name. Returns 0, which says that nobody noticed, or 2 when there is no such mistake.
int self_test(const std::string &mistake);
