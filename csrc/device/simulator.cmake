# What runs in the simulator: the shipped launchers with their cases, and the simulator's own tests.
find_path(GPT2FAST_CUDA_INCLUDE cuda_bf16.h HINTS ENV CUDA_HOME PATH_SUFFIXES include
    PATHS /usr/local/cuda /opt/cuda DOC "folder with CUDA's headers")
if(NOT GPT2FAST_CUDA_INCLUDE)
    message(FATAL_ERROR "The simulator needs CUDA's headers: set GPT2FAST_CUDA_INCLUDE. PyPI has \
them, too: nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl")
endif()

add_library(simulator INTERFACE)
target_include_directories(simulator INTERFACE ${PROJECT_SOURCE_DIR}/csrc)
target_include_directories(simulator SYSTEM INTERFACE
    ${GPT2FAST_CUDA_INCLUDE} ${GPT2FAST_CUDA_INCLUDE}/cccl)
target_compile_options(simulator INTERFACE -Wall -Wextra -Wno-unknown-pragmas)
target_link_libraries(simulator INTERFACE Threads::Threads ${CMAKE_DL_LIBS})
if(GPT2FAST_SANITIZE)
    target_compile_options(simulator INTERFACE -g1 -fno-omit-frame-pointer
        -fsanitize=${GPT2FAST_SANITIZE} -fno-sanitize-recover=all)
    target_link_options(simulator INTERFACE -fsanitize=${GPT2FAST_SANITIZE})
endif()

# Little optimization, since tests are compiled more often than they run; none with the checks of
# every address, which then take a tenth of the time to compile (the attention kernels: 14 s).
if(GPT2FAST_SANITIZE MATCHES "address|undefined")
    target_compile_options(simulator INTERFACE -O0)
else()
    target_compile_options(simulator INTERFACE -O1)
endif()

# The launchers, from the files that nvcc compiles.
file(GLOB GPT2FAST_LAUNCHERS CONFIGURE_DEPENDS csrc/launch/*.cu)
file(GLOB GPT2FAST_CASES CONFIGURE_DEPENDS csrc/tests/simulated/*.cpp)
if(GPT2FAST_LAUNCHERS)
    set_source_files_properties(${GPT2FAST_LAUNCHERS} PROPERTIES
        LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
    add_executable(simulated_test ${GPT2FAST_LAUNCHERS} ${GPT2FAST_CASES})
    target_include_directories(simulated_test PRIVATE csrc/tests/simulated)
    target_link_libraries(simulated_test PRIVATE simulator)
    # A sanitizer sees a missing barrier or an access out of bounds under any schedule, and results
    # are compared without one: once is enough. `ctest -C Slow` runs all schedules.
    if(GPT2FAST_SANITIZE)
        add_test(NAME simulated COMMAND simulated_test --once)
        add_test(NAME simulated_schedules COMMAND simulated_test CONFIGURATIONS Slow)
    else()
        add_test(NAME simulated COMMAND simulated_test)
    endif()
endif()

# The planted bugs (docs/simulator.md). As one source: the simulator is compiled once.
file(GLOB GPT2FAST_GALLERY CONFIGURE_DEPENDS csrc/tests/simulated/gallery/*.cpp)
add_executable(gallery EXCLUDE_FROM_ALL ${GPT2FAST_GALLERY})
target_link_libraries(gallery PRIVATE simulator)
set_target_properties(gallery PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)

# The simulated machine seen from Python, and its layouts beside CuTe's. For pytest, which knows
# where the two packages are (tests/simulator/programs.py).
find_package(pybind11 CONFIG QUIET)
set(GPT2FAST_CUTLASS_INCLUDE "" CACHE PATH "CUTLASS' headers, as in PyPI's nvidia-cutlass")
if(pybind11_FOUND AND NOT GPT2FAST_SANITIZE)
    pybind11_add_module(simulator_tests EXCLUDE_FROM_ALL NO_EXTRAS
        csrc/tests/simulated/module/module.cpp csrc/tests/simulated/module/probes.cpp)
    target_link_libraries(simulator_tests PRIVATE simulator)
    if(GPT2FAST_CUTLASS_INCLUDE)
        target_sources(simulator_tests PRIVATE csrc/tests/simulated/module/layouts.cpp)
        target_compile_definitions(simulator_tests PRIVATE GPT2FAST_CUTE)
        target_include_directories(simulator_tests SYSTEM PRIVATE
            ${GPT2FAST_CUTLASS_INCLUDE})
    endif()
endif()
