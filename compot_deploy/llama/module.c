/* An empty Python module around the plug-in: Python finds and ships it like any extension, ctypes calls it. */
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_plugin", "The C plug-in of compot_deploy.llama; called through ctypes.", -1,
                                        NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__plugin(void) { return PyModule_Create(&definition); }
