"""The structs of csrc/tables.h for ctypes; test_cuda_kernel.py holds them to those of the compiler."""

import ctypes

import texp

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)  # Dtype
STEP, IDLE, STATISTIC = range(3)  # RowKind
IN_HOST, IN_FLOAT32, IN_FLOAT64 = range(3)  # Number::In
ENUMS = {
    "Dtype": ("float32", "float64", "bfloat16", "float16"),
    "RowKind": ("step", "idle", "statistic"),
    "Number::In": ("host", "float32", "float64"),
}


class Row(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_double) for name in texp.theory.Row._fields)


class TensorEntry(ctypes.Structure):
    _fields_ = (
        ("p", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("row", ctypes.c_int32),
        ("dtypes", ctypes.c_uint8),  # of p, 4 times that of g, 16 times that of b
    )


class RowRequest(ctypes.Structure):
    _fields_ = (
        ("power", ctypes.c_double),
        ("group", ctypes.c_int32),
        ("slot", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("has_buffer", ctypes.c_bool),
        ("newly_allocated", ctypes.c_bool),
    )


class Number(ctypes.Union):
    _fields_ = (("value", ctypes.c_double), ("at", ctypes.c_void_p))


class DeviceScale(ctypes.Structure):
    _fields_ = (
        ("P", ctypes.c_double),
        ("kappa", ctypes.c_double),
        ("exponent", ctypes.c_int64),
        ("momentum_initialized", ctypes.c_int64),
    )


class GroupEntry(ctypes.Structure):
    _fields_ = (
        ("lr", Number),
        ("momentum", Number),
        ("dampening", Number),
        ("weight_decay", Number),
        ("scale", ctypes.c_void_p),
        ("begin", ctypes.c_int32),
        ("end", ctypes.c_int32),
        ("in", ctypes.c_uint8 * 4),
        ("nesterov", ctypes.c_bool),
        ("maximize", ctypes.c_bool),
        ("scale_invariant", ctypes.c_bool),
        ("without_buffers", ctypes.c_bool),
    )


class DeviceStep(ctypes.Structure):
    _fields_ = (
        ("grad_scale", ctypes.c_void_p),
        ("found_inf", ctypes.c_void_p),
        ("momentum_initialized", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("skip", ctypes.c_void_p),
    )


STRUCTS = (TensorEntry, RowRequest, Number, DeviceScale, GroupEntry, DeviceStep, Row)
