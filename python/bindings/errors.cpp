// sparvar::Error as Python exceptions. They are made here and not in Python, so that the module stands alone.
#include <array>

#include "bindings.h"
#include "sparvar/error.h"

namespace sparvar::python {
namespace {

/// By ErrorKind. Never given back: a translator may run until the interpreter is gone.
std::array<PyObject*, 4> classes{};

PyObject* new_class(nb::module_& module, const char* name, const char* doc, PyObject* bases) {
  const std::string qualified = nb::cast<std::string>(module.attr("__name__")) + "." + name;
  PyObject* made = PyErr_NewExceptionWithDoc(qualified.c_str(), doc, bases, nullptr);
  if (made == nullptr) nb::raise_python_error();
  module.attr(name) = nb::borrow(made);
  return made;
}

void translate(const std::exception_ptr& failure, void*) {
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    PyErr_SetString(classes.at(static_cast<std::size_t>(error.kind())), error.what());
  }
}

}  // namespace

void bind_errors(nb::module_& module) {
  PyObject* base = new_class(module, "Error", "Any failure of the engine: one line that says what, where, what to do.",
                             PyExc_Exception);
  const auto derived = [&](const char* name, PyObject* also, const char* doc) {
    return new_class(module, name, doc, nb::make_tuple(nb::borrow(base), nb::borrow(also)).ptr());
  };
  classes[static_cast<std::size_t>(ErrorKind::usage)] =
      derived("UsageError", PyExc_ValueError, "An argument asks for something that cannot be.");
  classes[static_cast<std::size_t>(ErrorKind::input)] =
      derived("InputError", PyExc_ValueError, "A file or tensor is not what it should be.");
  classes[static_cast<std::size_t>(ErrorKind::system)] =
      derived("ResourceError", PyExc_RuntimeError, "Memory, a device, a disk or permissions are missing.");
  classes[static_cast<std::size_t>(ErrorKind::cancelled)] =
      derived("Cancelled", PyExc_RuntimeError, "The work was stopped before it was done.");
  nb::register_exception_translator(translate, nullptr);
}

}  // namespace sparvar::python
