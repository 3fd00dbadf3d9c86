// How Python finds and calls the functions of a C++ file.

#pragma once

#include <cstdint>
#include <new>
#include <system_error>
#include <type_traits>

// The table of the functions that Python calls (`Library` in build.py reads it). Their types are
// written once, in C++: Python gets a letter for each argument, p for a pointer, i for an int64_t
// and f for a float.
struct Export {
    const char *name, *types;
    void* function;  // returns a Status
};

enum Status { DONE, OUT_OF_MEMORY, NO_THREAD, FAILED };

template <class T>
constexpr char letter() {
    static_assert(std::is_pointer_v<T> || std::is_same_v<T, int64_t> || std::is_same_v<T, float>);
    return std::is_pointer_v<T> ? 'p' : std::is_same_v<T, float> ? 'f' : 'i';
}

template <auto function>
struct Exported;

template <class... Arguments, void (*function)(Arguments...)>
struct Exported<function> {
    static constexpr char types[] = {letter<Arguments>()..., 0};

    // No exception may leave a function that was called from another language.
    static int call(Arguments... arguments) {
        try {
            function(arguments...);
            return DONE;
        } catch (const std::bad_alloc&) {
            return OUT_OF_MEMORY;
        } catch (const std::system_error&) {
            return NO_THREAD;
        } catch (...) {
            return FAILED;
        }
    }
};

template <auto function>
Export exported(const char* name) {
    return {name, Exported<function>::types, (void*)Exported<function>::call};
}
