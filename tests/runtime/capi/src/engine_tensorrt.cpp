/** The program `engine` with the backend of TensorRT, which is compiled with it and not with the library. */
#include "engine.cpp"
