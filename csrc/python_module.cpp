#define Py_LIMITED_API 0x030A0000
#include "python_module.h"

#include <Python.h>

#include <utility>

namespace nexus {
namespace {

// What a signal handler raised while a caller waited without the GIL. Guarded by the GIL.
PyObject* pending_interrupt = nullptr;

PyObject* take_interrupt(PyObject*, PyObject*) {
  if (pending_interrupt == nullptr) Py_RETURN_NONE;
  PyObject* taken = pending_interrupt;
  pending_interrupt = nullptr;
  return taken;
}

thread_local std::string failure;

PyObject* take_failure(PyObject*, PyObject*) {
  const std::string taken = std::exchange(failure, {});
  return PyUnicode_FromStringAndSize(taken.data(), static_cast<Py_ssize_t>(taken.size()));
}

PyMethodDef methods[] = {
    {"take_interrupt", take_interrupt, METH_NOARGS,
     "The exception of the signal handler that ended a wait, or None."},
    {"take_failure", take_failure, METH_NOARGS,
     "What the last acquire or release of this thread that failed said; empty if none did."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_native",
                      "Importing it registers torch.ops.nexus.*.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

void note_failure(const std::string& text) { failure = text; }

bool check_python_signals() {
  if (!Py_IsInitialized()) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  if (raised) {
    PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    Py_XDECREF(pending_interrupt);
    pending_interrupt = value;
    Py_XDECREF(type);
    Py_XDECREF(traceback);
  }
  PyGILState_Release(state);
  return raised;
}

}  // namespace nexus

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&nexus::module); }
