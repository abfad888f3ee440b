#include "bindings.h"

NB_MODULE(_engine, m) {
  m.doc() = "The engine behind the package sparvar. Use sparvar; names here may change with every version.";
  m.attr("version") = SPARVAR_VERSION;
  nanobind::set_leak_warnings(false);  // the package keeps recent plans and kernels until the process ends
  sparvar::python::bind_errors(m);
  sparvar::python::bind_plans(m);
  sparvar::python::bind_lists(m);
  sparvar::python::bind_analyzer(m);
  sparvar::python::bind_pipeline(m);
  sparvar::python::bind_attention(m);
  sparvar::python::bind_convert(m);
}
