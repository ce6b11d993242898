"""The structs of csrc/tables.h, which the kernels read: their fields and, as C aligns them, where each is."""

from ctypes import Structure, Union, c_bool, c_double, c_int32, c_int64, c_uint8, c_void_p, sizeof

from texp import theory

STEP, IDLE, STATISTIC = range(3)  # RowKind
HOST, FLOAT32, FLOAT64 = range(3)  # Number::In

SQUARES, GRAD_SQUARES, GRAD_MAX = range(3)  # Reduction

# In the order of Dtype. A tensor's byte has that of p in bits 0 and 1, of g in 2 and 3, and of b in 4 and 5.
DTYPES = ("float32", "float64", "bfloat16", "float16")


class TensorEntry(Structure):
    _fields_ = [
        ("p", c_void_p), ("g", c_void_p), ("b", c_void_p), ("numel", c_int64), ("row", c_int32), ("dtypes", c_uint8),
        ("unused", c_uint8 * 3),
    ]  # fmt: skip


class RowRequest(Structure):
    _fields_ = [
        ("power", c_double), ("group", c_int32), ("slot", c_int32), ("kind", c_uint8), ("has_buffer", c_bool),
        ("newly_allocated", c_bool), ("unused", c_uint8 * 5),
    ]  # fmt: skip


class Number(Union):
    _fields_ = [("value", c_double), ("at", c_void_p)]


class DeviceScale(Structure):
    _fields_ = [("P", c_double), ("kappa", c_double), ("exponent", c_int64), ("momentum_initialized", c_int64)]


class Trust(Structure):
    _fields_ = [
        ("coeff", c_double), ("eps", c_double), ("is_used", c_bool), ("clips", c_bool), ("always_adapts", c_bool),
        ("unused", c_uint8 * 5),
    ]  # fmt: skip


class GroupEntry(Structure):
    _fields_ = [
        ("lr", Number), ("momentum", Number), ("dampening", Number), ("weight_decay", Number), ("scale", c_void_p),
        ("begin", c_int32), ("end", c_int32), ("in", c_uint8 * 4), ("nesterov", c_bool), ("maximize", c_bool),
        ("scale_invariant", c_bool), ("without_buffers", c_bool), ("trust", Trust),
    ]  # fmt: skip


class DeviceStep(Structure):
    _fields_ = [
        ("grad_scale", c_void_p), ("found_inf", c_void_p), ("norm", c_void_p), ("max_norm", c_double),
        ("skips_nonfinite", c_bool), ("momentum_initialized", c_void_p), ("rows", c_void_p), ("skip", c_void_p),
        ("sums", c_void_p),
    ]  # fmt: skip


class Row(Structure):
    _fields_ = [(name, c_double) for name in theory.Row._fields]


def offsets(struct: type[Structure]) -> dict[str, int]:
    """Where each field is, by its name, and under "size" that of the struct."""
    fields = {name: getattr(struct, name).offset for name, *_ in struct._fields_ if name != "unused"}
    return {"size": sizeof(struct), **fields}
