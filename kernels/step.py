"""A step on a GPU in Triton, for those who have no CUDA compiler: `advance` makes the rows, `apply` applies them,
`reduce` and `add` sum up squares, of which `norm` makes what gradients are clipped by.

What they read are the structs of csrc/tables.h, of which texp.kernels.layout says what is where, as bytes. Besides, a
launch has a table of tiles, one int64 for each program: a tensor's index (bits 32 to 63), and which tile of it.

Nothing that changes from step to step is a constant of a kernel, so that no schedule compiles anything again, and a
kernel that is compiled can be launched with whatever arguments there are: no alignment is assumed of them.
"""

import triton
import triton.language as tl

from texp.kernels import layout

# Addresses and counts that are multiples of 16 give 128-bit accesses.
VECTOR = tl.constexpr(16)


def _constants(struct: type, *names: str) -> list[tl.constexpr]:
    return [tl.constexpr(layout.offsets(struct)[name]) for name in names]


TENSOR, AT_P, AT_G, AT_B, AT_NUMEL, AT_ROW = _constants(layout.TensorEntry, "size", "p", "g", "b", "numel", "row")
REQUEST, AT_POWER, AT_OF_GROUP, AT_SLOT, AT_KIND, AT_HAS_BUFFER, AT_NEWLY_ALLOCATED = _constants(
    layout.RowRequest, "size", "power", "group", "slot", "kind", "has_buffer", "newly_allocated"
)
GROUP, AT_LR, AT_MOMENTUM, AT_DAMPENING, AT_WEIGHT_DECAY, AT_SCALE, AT_BEGIN, AT_END, AT_IN = _constants(
    layout.GroupEntry, "size", "lr", "momentum", "dampening", "weight_decay", "scale", "begin", "end", "in"
)
AT_NESTEROV, AT_MAXIMIZE, AT_SCALE_INVARIANT, AT_WITHOUT_BUFFERS = _constants(
    layout.GroupEntry, "nesterov", "maximize", "scale_invariant", "without_buffers"
)
AT_COEFF, AT_EPS, AT_IS_USED, AT_CLIPS, AT_ALWAYS_ADAPTS = [
    tl.constexpr(layout.GroupEntry.trust.offset + layout.offsets(layout.Trust)[name])
    for name in ("coeff", "eps", "is_used", "clips", "always_adapts")
]
AT_BIG_P, AT_KAPPA, AT_EXPONENT, AT_MOMENTUM_INITIALIZED = _constants(
    layout.DeviceScale, "P", "kappa", "exponent", "momentum_initialized"
)
STEP, IDLE, STATISTIC = map(tl.constexpr, (layout.STEP, layout.IDLE, layout.STATISTIC))
FLOAT32, FLOAT64 = map(tl.constexpr, (layout.FLOAT32, layout.FLOAT64))
SQUARES, GRAD_MAX = map(tl.constexpr, (layout.SQUARES, layout.GRAD_MAX))


@triton.jit
def _at(entry, OFFSET: tl.constexpr, T: tl.constexpr):
    """A pointer to a field of a struct, or of each of a block of structs."""
    return (entry + OFFSET).to(tl.pointer_type(T))


@triton.jit
def _field(entry, OFFSET: tl.constexpr, T: tl.constexpr):
    return tl.load(_at(entry, OFFSET, T))


@triton.jit
def _tile(tensors, tiles, TILE: tl.constexpr):
    """Of this program: the tensor's index and entry, the first element of the tile, and how many there are."""
    tile = tl.load(tiles + tl.program_id(0))
    index, first = tile >> 32, (tile & 0xFFFFFFFF) * TILE
    tensor = tensors + TENSOR * index
    return index, tensor, first, tl.minimum(_field(tensor, AT_NUMEL, tl.int64) - first, TILE).to(tl.int32)


@triton.jit
def _address(tensor, OFFSET: tl.constexpr, first, E: tl.constexpr):
    """Of that element, of type E, of p, g or b; 0 where there is none."""
    address = _field(tensor, OFFSET, tl.int64)
    return tl.where(address == 0, 0, address + first * (E.primitive_bitwidth // 8))


@triton.jit
def _times(a, x):
    """a·x, and −0 where a is 0, which added to anything leaves it as it is."""
    return tl.where(a == 0, -0.0, a * x)


@triton.jit
def _plus(a, x, y):
    """a·x + y, and y where a is 0: a term that a row does not have must not make NaN of infinite numbers."""
    return tl.where(a == 0, y, a * x + y)


@triton.jit
def _narrow(x, E: tl.constexpr):
    """Rounded to the type E: from float64 to 16 bits by way of float32, as torch and the other kernels do."""
    if E.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(E)


@triton.jit
def _update(row, p, g, b, offsets, mask, T: tl.constexpr):
    """The four equations of texp.theory.Row, in the type T; p and b are modified in place."""
    # Compared after they are broadcast: the interpreter makes integers of a truth that it broadcasts, and from 3.9 on
    # takes none for a mask.
    has_g = tl.broadcast_to(g.to(tl.int64, bitcast=True), offsets.shape) != 0
    has_b = tl.broadcast_to(b.to(tl.int64, bitcast=True), offsets.shape) != 0
    weight = tl.load(p + offsets, mask).to(T)
    grad = tl.load(g + offsets, mask & has_g, other=0.0).to(T)
    buf = tl.load(b + offsets, mask & has_b, other=0.0).to(T)
    a_b, a_g, a_p = tl.load(row).to(T), tl.load(row + 1).to(T), tl.load(row + 2).to(T)
    c_u, c_g, c_p = tl.load(row + 3).to(T), tl.load(row + 4).to(T), tl.load(row + 5).to(T)
    s_p, e, r_u, r_d = tl.load(row + 6).to(T), tl.load(row + 7).to(T), tl.load(row + 8).to(T), tl.load(row + 9).to(T)
    u = _plus(a_b, buf, _plus(a_p, weight, _times(a_g, grad)))
    d = _plus(c_u, u, _plus(c_p, weight, _times(c_g, grad)))
    tl.store(p + offsets, _narrow(s_p * weight - e * d, p.dtype.element_ty), mask)
    buf = _narrow(_plus(r_d, d, r_u * u), b.dtype.element_ty)
    tl.store(b + offsets, buf, mask & has_b)


@triton.jit(do_not_specialize_on_alignment=["tensors", "tiles", "rows", "skip"])
def apply(
    P: tl.constexpr, G: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, ON_DEVICE: tl.constexpr,
    tensors, tiles, rows, skip,
):  # fmt: skip
    """Applies its row to TILE elements of a tensor whose elements are of type P, those of its gradient of type G and
    those of its buffer of type B; each is converted to the type of the arithmetic: float64 if one of them is.

    ON_DEVICE: each tensor has a row of its own, left by `advance`, and nothing is changed if that says so in `skip`;
    otherwise its entry says which row, and `skip` is not read.
    """
    if ON_DEVICE:
        if tl.load(skip) != 0:
            return
    WIDEST: tl.constexpr = max(P.primitive_bitwidth, G.primitive_bitwidth, B.primitive_bitwidth)
    T: tl.constexpr = tl.float64 if WIDEST == 64 else tl.float32
    index, tensor, first, count = _tile(tensors, tiles, TILE)
    row = rows + 10 * (index if ON_DEVICE else _field(tensor, AT_ROW, tl.int32))
    p, g, b = _address(tensor, AT_P, first, P), _address(tensor, AT_G, first, G), _address(tensor, AT_B, first, B)
    p_at, g_at, b_at = p.to(tl.pointer_type(P)), g.to(tl.pointer_type(G)), b.to(tl.pointer_type(B))
    offsets = tl.arange(0, TILE)
    if ((p | g | b) & 15) == 0:
        whole = count // VECTOR * VECTOR
        # Pointers of their own, for what is said of them holds in this branch only.
        aligned_p = tl.multiple_of(p.to(tl.pointer_type(P)), 16)
        aligned_g = tl.multiple_of(g.to(tl.pointer_type(G)), 16)
        aligned_b = tl.multiple_of(b.to(tl.pointer_type(B)), 16)
        _update(row, aligned_p, aligned_g, aligned_b, offsets, offsets < tl.multiple_of(whole, 16), T)
        if whole < count:
            rest = whole + tl.arange(0, VECTOR)
            _update(row, p_at, g_at, b_at, rest, rest < count, T)
    else:
        _update(row, p_at, g_at, b_at, offsets, offsets < count, T)


@triton.jit
def _magnitude(x):
    """The bits of |x|, which as integers are ordered as the numbers are, and NaN above infinity: a maximum of floats
    passes over it.
    """
    return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def _both(x, y, MAX: tl.constexpr):
    return tl.where(_magnitude(x) > _magnitude(y), x, y) if MAX else x + y


@triton.jit
def _all(x, MAX: tl.constexpr):
    return tl.max(_magnitude(x)).to(tl.float64, bitcast=True) if MAX else tl.sum(x)


@triton.jit
def _reduced(x, offsets, count, MAX: tl.constexpr):
    value = tl.load(x + offsets, offsets < count, other=0.0).to(tl.float64)
    return _all(value if MAX else value * value, MAX)


@triton.jit
def _of_elements(address, count, E: tl.constexpr, TILE: tl.constexpr, MAX: tl.constexpr):
    """The sum of the squares, or the largest magnitude, of `count` elements of type E, in float64; 0 where there are
    none.
    """
    x, offsets, count = address.to(tl.pointer_type(E)), tl.arange(0, TILE), tl.where(address == 0, 0, count)
    if (address & 15) == 0:
        whole = count // VECTOR * VECTOR
        aligned = tl.multiple_of(address.to(tl.pointer_type(E)), 16)
        total = _reduced(aligned, offsets, tl.multiple_of(whole, 16), MAX)
        total = _both(total, _reduced(x, whole + tl.arange(0, VECTOR), count, MAX), MAX)
    else:
        total = _reduced(x, offsets, count, MAX)
    return total


@triton.jit(do_not_specialize_on_alignment=["tensors", "tiles", "begins", "of_tiles"])
def reduce(
    P: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, REDUCTION: tl.constexpr, tensors, tiles, begins, of_tiles
):
    """‖p‖² and ‖g‖² of a tile, into of_tiles, where those of each tensor's tiles begin at `begins`; or ‖g‖² alone, or
    max |g|, in the place of ‖g‖².
    """
    index, tensor, first, count = _tile(tensors, tiles, TILE)
    to = of_tiles + 2 * (tl.load(begins + index) + first // TILE)
    if REDUCTION == SQUARES:
        tl.store(to, _of_elements(_address(tensor, AT_P, first, P), count, P, TILE, False))
    g = _address(tensor, AT_G, first, G)
    tl.store(to + 1, _of_elements(g, count, G, TILE, REDUCTION == GRAD_MAX))


@triton.jit
def _of_tiles(of_tiles, at, end, BLOCK: tl.constexpr, MAX: tl.constexpr):
    """The sum, or the maximum, of every other number."""
    total = tl.zeros((BLOCK,), tl.float64)
    while at < end:
        i = at + tl.arange(0, BLOCK)
        total = _both(total, tl.load(of_tiles + 2 * i, i < end, other=0.0), MAX)
        at += BLOCK
    return _all(total, MAX)


@triton.jit(do_not_specialize_on_alignment=["begins", "of_tiles", "sums"])
def add(BLOCK: tl.constexpr, REDUCTION: tl.constexpr, begins, of_tiles, sums):
    """Puts together what `reduce` leaves of a tensor's tiles, always in the same order."""
    index = tl.program_id(0)
    at, end = tl.load(begins + index), tl.load(begins + index + 1)
    if REDUCTION == SQUARES:
        tl.store(sums + 2 * index, _of_tiles(of_tiles, at, end, BLOCK, False))
    tl.store(sums + 2 * index + 1, _of_tiles(of_tiles + 1, at, end, BLOCK, REDUCTION == GRAD_MAX))


@triton.jit
def _given(pointer, other):
    """What is there, in float64; where the pointer is null, `other`."""
    return tl.load(pointer, pointer.to(tl.int64, bitcast=True) != 0, other=other).to(tl.float64)


@triton.jit
def _float64(address, mask):
    """What is at an address that was loaded. Half by half: up to 3.9 at least, Triton sets the result of a load to 0
    first, and of one that is as wide as an address that nothing else needs, LLVM puts both into one register. It is
    then address 0 that is read.
    """
    halves = address.to(tl.pointer_type(tl.uint32))
    low, high = tl.load(halves, mask, other=0).to(tl.int64), tl.load(halves + 1, mask, other=0).to(tl.int64)
    return (high << 32 | low).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["groups", "requests", "clip", "sums", "grad_scale", "to"])
def norm(BLOCK: tl.constexpr, REDUCTION: tl.constexpr, groups, requests, clip, sums, grad_scale, to):
    """The norm of all gradients at θ, of which `add` leaves sums[2·i + 1] of tensor i: that at p is 1/P of it, and
    grad_scale times as much, where that is not null. Of one program, always in the same order.

    clip: max_norm, whether `advance` skips what is not finite, and how many tensors there are, all in float64.
    """
    MAX: tl.constexpr = REDUCTION == GRAD_MAX
    at, end = 0, tl.load(clip + 2).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    while at < end:
        i = at + tl.arange(0, BLOCK)
        mask = i < end
        group = tl.load(_at(requests + REQUEST * i.to(tl.int64), AT_OF_GROUP, tl.int32), mask, other=0)
        scale = tl.load(_at(groups + GROUP * group.to(tl.int64), AT_SCALE, tl.int64), mask, other=0)
        P, value = _float64(scale + AT_BIG_P, mask), tl.load(sums + 2 * i + 1, mask, other=0.0)
        total = _both(total, P * value if MAX else P * P * value, MAX)
        at += BLOCK
    total = _all(total, MAX)
    tl.store(to, (total if MAX else tl.sqrt(total)) / _given(grad_scale, 1.0))


@triton.jit
def _number(group, OFFSET: tl.constexpr, i: tl.constexpr):
    """A hyperparameter, the one whose place is in[i]: given, or at an address."""
    word, where = _field(group, OFFSET, tl.int64), _field(group, AT_IN + i, tl.uint8)
    value = word.to(tl.float64, bitcast=True)
    if where == FLOAT32:
        value = tl.load(word.to(tl.pointer_type(tl.float32))).to(tl.float64)
    if where == FLOAT64:
        value = _float64(word, True)
    return value


@triton.jit
def _clipped(kappa, limit):
    return tl.minimum(tl.maximum(kappa, 0.0), limit)


@triton.jit(
    do_not_specialize_on_alignment=[
        "groups", "requests", "rows", "skip", "clip", "sums", "momentum_initialized", "grad_scale", "found_inf",
        "norm",
    ]
)  # fmt: skip
def advance(
    BLOCK: tl.constexpr, groups, requests, rows, skip, clip, sums, momentum_initialized, grad_scale, found_inf, norm
):
    """Computes the rows that one group's tensors request, and advances its P and κ: texp.theory.advance, in float64.
    All gradients are multiplied by clip_factor of csrc/math/scale.h, unless `norm`, that of the kernel, and `clip`
    are null. Where a group has a Trust, gradient and decay of each tensor are multiplied by its trust_ratio of the
    same file, which is made of ‖p‖² and ‖g‖², as `add` leaves them; where none has, `sums` may be null.

    If found_inf is not 0, nothing is changed, and `skip` says so to `apply`; the same where norm is not finite and
    `clip` says so. A null found_inf counts as 0, a null grad_scale as 1, and a group whose scale is null as none.
    """
    length, max_norm = _given(norm, 0.0), _given(clip, float("inf"))
    finite = length < float("inf")
    factor = max_norm / (length + 1e-6)
    factor = tl.where(finite, tl.where(factor < 1, factor, 1.0), float("nan"))
    skips_nonfinite = tl.load(clip + 1, clip.to(tl.int64, bitcast=True) != 0, other=0.0) != 0
    overflow = (_given(found_inf, 0.0) != 0) | (skips_nonfinite & (finite == 0))
    if tl.program_id(0) == 0:
        tl.store(skip, overflow.to(tl.int32))
    if overflow:
        return
    group = groups + GROUP * tl.program_id(0)
    if _field(group, AT_SCALE, tl.int64) == 0:
        return
    lr, momentum = _number(group, AT_LR, 0), _number(group, AT_MOMENTUM, 1)
    dampening, weight_decay = _number(group, AT_DAMPENING, 2), _number(group, AT_WEIGHT_DECAY, 3)
    nesterov, maximize = _field(group, AT_NESTEROV, tl.uint8) != 0, _field(group, AT_MAXIMIZE, tl.uint8) != 0
    scale_invariant = _field(group, AT_SCALE_INVARIANT, tl.uint8) != 0
    without_buffers = _field(group, AT_WITHOUT_BUFFERS, tl.uint8) != 0
    scale = _field(group, AT_SCALE, tl.int64).to(tl.pointer_type(tl.uint8))
    P, kappa = _field(scale, AT_BIG_P, tl.float64), _field(scale, AT_KAPPA, tl.float64)
    exponent, initialized = _field(scale, AT_EXPONENT, tl.int64), _field(scale, AT_MOMENTUM_INITIALIZED, tl.int64)
    first = without_buffers | (initialized == 0)

    # torch.optim.SGD, with ĝ = g + λθ: v ← keep·v + enter·ĝ and θ ← θ − η(direct·ĝ + through·v)
    plain = momentum == 0
    keep, enter = tl.where(plain, 1.0, momentum), tl.where(plain, 0.0, 1 - dampening)
    direct, through = tl.where(plain | nesterov, 1.0, 0.0), tl.where(plain, 0.0, tl.where(nesterov, momentum, 1.0))

    # The most of κ and of μ that one step hands over to the scale.
    sum_ = 1 + momentum
    most_kappa = tl.where(nesterov, 2 * (1 - momentum) / (sum_ * sum_), 1 - tl.sqrt(momentum))
    most_mu = tl.where(nesterov, (1 - momentum) / sum_, most_kappa)
    none = (scale_invariant == 0) | (momentum >= 1) | (lr < 0)
    divisor = tl.where(lr == 0, 1.0, lr)
    limit_kappa = tl.minimum(tl.where(plain, 1.0, most_kappa), 0.5) / divisor
    limit_mu = tl.minimum(tl.where(plain, 1.0, most_mu), 0.5) / divisor
    limit_kappa = tl.where(none, 0.0, tl.where(lr == 0, float("inf"), limit_kappa))
    limit_mu = tl.where(none, 0.0, tl.where(lr == 0, float("inf"), limit_mu))

    limit_kappa = tl.where(first & (lr == 0) & (momentum != 0), 0.0, limit_kappa)
    kappa_running = keep * kappa + enter * weight_decay
    kappa_first = tl.where(plain, kappa_running, weight_decay)
    kappa_c = _clipped(tl.where(first, kappa_first, kappa_running), limit_kappa)
    mu = direct * weight_decay + through * kappa_c
    mu_c = _clipped(mu, limit_mu)
    alpha = 1 - lr * mu_c  # from 1/2 to 1, so that P/α, with P in [1, 2), is less than 4
    halves = P / alpha >= 2
    shrink = tl.where(halves, 0.5, 1.0)
    growth = shrink / alpha

    P2 = P * P
    divided_by = _given(grad_scale, 1.0) / factor
    sign = tl.where(maximize, -1.0, 1.0) / divided_by
    heavy_ball = direct == 0  # then d = u, and α·u + κc·η·d is u itself
    idle_a_p = alpha * (kappa - kappa_c / alpha) / P2
    r_u, r_d = tl.where(heavy_ball, 1.0, alpha) / shrink, tl.where(heavy_ball, 0.0, kappa_c * lr) / shrink

    coeff, eps = _field(group, AT_COEFF, tl.float64), _field(group, AT_EPS, tl.float64)
    clips, always_adapts = _field(group, AT_CLIPS, tl.uint8) != 0, _field(group, AT_ALWAYS_ADAPTS, tl.uint8) != 0
    has_ratio = (_field(group, AT_IS_USED, tl.uint8) != 0) & ((weight_decay != 0) | always_adapts)
    has_ratio &= (clips == 0) | (lr != 0)
    over, most = tl.where(clips, lr, 1.0), tl.where(clips, 1.0, float("inf"))

    # The interpreter cannot broadcast a comparison of floats.
    kind_with_momentum, kind_with_ratio = tl.where(plain, -1, STEP), tl.where(has_ratio, STEP, -1)
    at, end = _field(group, AT_BEGIN, tl.int32), _field(group, AT_END, tl.int32)
    while at < end:
        i = at + tl.arange(0, BLOCK)
        mask = i < end
        request = requests + REQUEST * tl.minimum(i, end - 1).to(tl.int64)
        kind, power = _field(request, AT_KIND, tl.uint8), _field(request, AT_POWER, tl.float64)
        has_buffer = _field(request, AT_HAS_BUFFER, tl.uint8) != 0
        is_old = has_buffer & (_field(request, AT_NEWLY_ALLOCATED, tl.uint8) == 0)
        own = momentum_initialized + _field(request, AT_SLOT, tl.int32)
        known = tl.load(own, mask & is_old, other=0) != 0
        uninitialized = has_buffer & (known == 0)
        steps, idle = kind == STEP, kind == IDLE
        starts = (kind == kind_with_momentum) & uninitialized
        runs = steps & (starts == 0)
        # Powers 1 and 2, those of means and variances behind one layer, are exact products.
        grown = tl.exp(tl.where(kind == STATISTIC, power, 0.0) * tl.log(growth))
        grown = tl.where(power == 1, growth, tl.where(power == 2, growth * growth, grown))

        p_norm = tl.sqrt(tl.load(sums + 2 * i, mask & (kind == kind_with_ratio), other=0.0))
        g_norm = tl.sqrt(tl.load(sums + 2 * i + 1, mask & (kind == kind_with_ratio), other=0.0)) / tl.abs(divided_by)
        ratio = coeff * p_norm / (g_norm + p_norm * weight_decay + eps)
        ratio = tl.where((p_norm > 0) & (g_norm > 0), ratio, 1.0) / over
        ratio = tl.where(kind == kind_with_ratio, tl.where(ratio > most, most, ratio), 1.0)

        a_b = tl.where(runs, keep, tl.where(idle, alpha, 0.0))
        a_g = tl.where(runs, enter * sign, tl.where(starts, sign, 0.0))
        a_p = tl.where(runs, kappa_running, kappa_first) - kappa_c
        # A buffer that is not initialized yet stays 0.
        a_p = tl.where(steps, a_p / P2, tl.where(idle & (uninitialized == 0), idle_a_p, 0.0))
        row = rows + 10 * i.to(tl.int64)
        tl.store(row, a_b, mask)
        tl.store(row + 1, a_g * ratio, mask)
        tl.store(row + 2, a_p * ratio, mask)
        tl.store(row + 3, tl.where(steps, through, 0.0), mask)
        tl.store(row + 4, tl.where(steps, direct * sign * ratio, 0.0), mask)
        tl.store(row + 5, tl.where(steps, (mu - mu_c) / P2 * ratio, 0.0), mask)
        tl.store(row + 6, tl.where(steps, shrink, tl.where(idle, growth, grown)), mask)
        tl.store(row + 7, tl.where(steps, P2 * lr / alpha * shrink, 0.0), mask)
        tl.store(row + 8, tl.where(steps, r_u, tl.where(idle, 1 / shrink, 0.0)), mask)
        tl.store(row + 9, tl.where(steps, r_d, 0.0), mask)
        tl.store(own, 1, mask & (kind == kind_with_momentum) & has_buffer)
        at += BLOCK

    tl.debug_barrier()  # all threads have read the scale
    tl.store(_at(scale, AT_BIG_P, tl.float64), P / alpha * shrink)
    tl.store(_at(scale, AT_KAPPA, tl.float64), kappa_c / alpha)
    tl.store(_at(scale, AT_EXPONENT, tl.int64), exponent + tl.where(halves, 1, 0))
    initialized = tl.where(((without_buffers == 0) & (initialized != 0)) | (momentum != 0), 1, 0)
    tl.store(_at(scale, AT_MOMENTUM_INITIALIZED, tl.int64), initialized)
