# The compiler rule of the project: clang 19; g++ before 13 is refused because it miscompiles coroutines.

function(gantry_check_compiler)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
        message(FATAL_ERROR
            "g++ ${CMAKE_CXX_COMPILER_VERSION} silently miscompiles coroutines (GCC bugs 99576, 98401, 102217, 104177, "
            "100897: temporaries of awaited expressions destroyed twice, lost branches, unaligned locals). "
            "Use clang-19: cmake --preset release (or ./bootstrap deps to install it).")
    endif()
    if(CMAKE_CXX_COMPILER_ID MATCHES "Clang" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 19)
        message(FATAL_ERROR "clang ${CMAKE_CXX_COMPILER_VERSION} is too old for this code (C++23, std::expected); "
            "use clang-19: cmake --preset release (or ./bootstrap deps to install it).")
    endif()
endfunction()
