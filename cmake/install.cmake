# What `cmake --install` gives: headers, one library, the program, the bundled model, a CMake package, a pkg-config file.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(SPARVAR_INSTALL_MODELDIR ${CMAKE_INSTALL_DATADIR}/sparvar/models)
set(SPARVAR_INSTALL_CMAKEDIR ${CMAKE_INSTALL_LIBDIR}/cmake/sparvar)

install(DIRECTORY include/sparvar DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(DIRECTORY models/ DESTINATION ${SPARVAR_INSTALL_MODELDIR})
if(SPARVAR_CLI)
  install(TARGETS sparvar RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
install(TARGETS sparvar_library EXPORT sparvar ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT sparvar NAMESPACE sparvar:: FILE sparvarTargets.cmake DESTINATION ${SPARVAR_INSTALL_CMAKEDIR})

set(SPARVAR_MODEL_DIR ${SPARVAR_INSTALL_MODELDIR})
configure_package_config_file(cmake/sparvarConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/sparvarConfig.cmake
  INSTALL_DESTINATION ${SPARVAR_INSTALL_CMAKEDIR} PATH_VARS SPARVAR_MODEL_DIR)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/sparvarConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/sparvarConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/sparvarConfigVersion.cmake
  cmake/dnnl.cmake DESTINATION ${SPARVAR_INSTALL_CMAKEDIR})

# With a static library, the user of pkg-config links what it needs too.
set(SPARVAR_PC_REQUIRES "fmt zlib libpng libjpeg libwebp libwebpmux sentencepiece")
if(SPARVAR_STATIC)
  set(SPARVAR_PC_PRIVATE "")
  set(SPARVAR_PC_LIBS " -ldnnl -fopenmp -pthread")
  if(SPARVAR_CUDA)
    string(APPEND SPARVAR_PC_LIBS " ${CUDA_cudart_static_LIBRARY} -lrt -ldl")
  endif()
else()
  set(SPARVAR_PC_PRIVATE ".private")
  set(SPARVAR_PC_LIBS "")
endif()
file(RELATIVE_PATH SPARVAR_PC_PREFIX /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(cmake/sparvar.pc.in ${CMAKE_CURRENT_BINARY_DIR}/sparvar.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/sparvar.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
