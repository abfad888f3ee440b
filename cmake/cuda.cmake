# The CUDA backend. The runtime is linked statically and cuBLASLt and cuDNN are loaded when a GPU is used, so the program
# also runs where none of them is. Headers come from the toolkit or from the Python packages of `scripts/setup --cuda`.
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know it of CUDA 13
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
find_package(CUDAToolkit 12.4 REQUIRED)

file(GLOB site_packages ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages)
file(GLOB package_dirs ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/*)
set(hints ${CUDAToolkit_INCLUDE_DIRS})
set(library_dirs "")
foreach(dir ${package_dirs})
  list(APPEND hints ${dir}/include)
  list(APPEND library_dirs ${dir}/lib)
endforeach()
find_path(CUBLASLT_INCLUDE_DIR cublasLt.h HINTS ${hints} REQUIRED)
find_path(CUDNN_INCLUDE_DIR cudnn.h HINTS ${hints} REQUIRED)
find_path(CUDNN_FRONTEND_INCLUDE_DIR cudnn_frontend.h HINTS ${hints} ${site_packages}/include REQUIRED)
list(JOIN library_dirs ":" library_dirs)

file(GLOB cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/backend/cuda/*.cpp
  ${PROJECT_SOURCE_DIR}/src/backend/cuda/kernels/*.cu)
target_sources(sparvar_backend PRIVATE ${cuda_sources})
add_library(sparvar_cuda_headers INTERFACE)
target_include_directories(sparvar_cuda_headers SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS} ${CUBLASLT_INCLUDE_DIR}
  ${CUDNN_INCLUDE_DIR} ${CUDNN_FRONTEND_INCLUDE_DIR})
target_compile_definitions(sparvar_backend PRIVATE SPARVAR_CUDA_LIBRARY_DIRS="${library_dirs}")
target_link_libraries(sparvar_backend PRIVATE sparvar_cuda_headers CUDA::cudart_static ${CMAKE_DL_LIBS})

# Machine code for Ampere and Hopper, PTX for the rest.
set_target_properties(sparvar_backend PROPERTIES CUDA_ARCHITECTURES OFF)
target_compile_options(sparvar_backend PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-gencode=arch=compute_80,code=sm_80;-gencode=arch=compute_90a,code=sm_90a;-gencode=arch=compute_80,code=compute_80>")
set_source_files_properties(${PROJECT_SOURCE_DIR}/src/backend/cuda/cudnn.cpp TARGET_DIRECTORY sparvar_backend
  PROPERTIES COMPILE_OPTIONS "-Wno-restrict")  # gcc 12 sees overlaps in std::string that are none
