"""The C library: the runtime for applications in C and C++, its sources and what builds it."""
