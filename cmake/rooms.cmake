# gantry_room(NAME LIBS ...): the static library gantry_NAME from all sources of the folder NAME.
# gantry_program(NAME MAIN): an executable over every room.

add_library(gantry_flags INTERFACE)
target_include_directories(gantry_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(gantry_flags INTERFACE -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers -Werror)
target_compile_definitions(gantry_flags INTERFACE _FILE_OFFSET_BITS=64 GANTRY_VERSION="${PROJECT_VERSION}")
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    target_link_options(gantry_flags INTERFACE -fuse-ld=lld-19)
endif()
if(CMAKE_BUILD_TYPE STREQUAL "Debug")
    target_compile_options(gantry_flags INTERFACE -g1 -fno-omit-frame-pointer)
elseif(CMAKE_BUILD_TYPE STREQUAL "RelWithDebInfo")
    # Functions and lines, what a backtrace or a profile shows; the rest of -g takes a quarter of the time to compile.
    target_compile_options(gantry_flags INTERFACE -g1)
endif()
# What a test does counts, not how fast it does it: its own code (GANTRY_TEST_CODE) is compiled in half the time without optimisation.
if(GANTRY_SANITIZE)
    target_compile_options(gantry_flags INTERFACE -fsanitize=${GANTRY_SANITIZE} -fno-sanitize-recover=all
        $<IF:$<BOOL:$<TARGET_PROPERTY:GANTRY_TEST_CODE>>,-O0,-O1>)
    target_link_options(gantry_flags INTERFACE -fsanitize=${GANTRY_SANITIZE})
endif()
if(GANTRY_FUZZ)
    target_compile_options(gantry_flags INTERFACE -fsanitize=fuzzer-no-link)
    target_link_options(gantry_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()
# Link-time optimisation is for the programs that are used, and takes a minute or more for each: objects of the rooms hold
# both bitcode and native code, and test programs are linked from the latter.
if(GANTRY_LTO)
    target_compile_options(gantry_flags INTERFACE -fno-plt)
endif()

function(gantry_lto_objects target)
    if(GANTRY_LTO)
        target_compile_options(${target} PRIVATE -flto=thin -ffat-lto-objects)
    endif()
endfunction()

function(gantry_lto_program target)
    if(GANTRY_LTO)
        target_compile_options(${target} PRIVATE -flto=thin)
        target_link_options(${target} PRIVATE -flto=thin -Wl,--fat-lto-objects
            -Wl,--thinlto-cache-dir=${CMAKE_BINARY_DIR}/lto-cache)
    endif()
endfunction()

function(gantry_room name)
    cmake_parse_arguments(ARG "" "" "LIBS" ${ARGN})
    file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/${name}/*.cc)
    list(FILTER sources EXCLUDE REGEX "/main_[a-z]+\\.cc$")
    if(NOT sources)
        file(WRITE ${CMAKE_BINARY_DIR}/empty_${name}.cc "")
        set(sources ${CMAKE_BINARY_DIR}/empty_${name}.cc)
    endif()
    add_library(gantry_${name} STATIC ${sources})
    target_link_libraries(gantry_${name} PUBLIC gantry_flags ${ARG_LIBS})
    gantry_lto_objects(gantry_${name})
    if(NOT name STREQUAL "runtime")
        target_precompile_headers(gantry_${name} PRIVATE <string> <vector> <memory> <map> <expected> <functional>
            <coroutine> <optional> <string_view> <span> <chrono> <atomic> <boost/json/value.hpp>
            <boost/json/serialize.hpp> <boost/json/parse.hpp> <fmt/format.h>)
    endif()
endfunction()

function(gantry_program name main)
    if(EXISTS ${CMAKE_SOURCE_DIR}/${main})
        add_executable(${name} ${main})
        target_link_libraries(${name} PRIVATE gantry_cli)
        gantry_lto_program(${name})
    endif()
endfunction()
