/** What a C++ compiler asks of its standard library even where exceptions and types at run time are off. The library is
 *  linked without one, so that it runs where another, or an older one, is installed. (No class has a virtual destructor,
 *  so `operator delete` isn't asked for: a static library must not bring its own.) */

#include <cstdlib>

extern "C" [[gnu::visibility("hidden"), gnu::weak]] void __cxa_pure_virtual();

extern "C" void __cxa_pure_virtual()
{
    std::abort();
}
