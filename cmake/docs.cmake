# The target `docs`: the pages of the public headers and docs/api.md, by Doxygen.
find_package(Doxygen QUIET)
if(DOXYGEN_FOUND)
  configure_file(docs/Doxyfile.in ${CMAKE_CURRENT_BINARY_DIR}/Doxyfile @ONLY)
  add_custom_target(docs COMMAND ${DOXYGEN_EXECUTABLE} ${CMAKE_CURRENT_BINARY_DIR}/Doxyfile
    COMMAND ${CMAKE_COMMAND} -E echo "The API's pages: ${CMAKE_CURRENT_BINARY_DIR}/api/html/index.html" VERBATIM)
endif()
