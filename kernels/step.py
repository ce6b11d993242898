"""A step on a GPU in Triton, for those who have no CUDA compiler.

Kernels read tables that texp.kernels.launch uploads, as 64-bit words; csrc/cuda.h has the same layout as C++ structs:

    tensors  5 words each: p, g (of a statistic: its power, a float64), b, how many elements, and a word of fields:
             slot (bits 0 to 31), source (32 to 47), kind (48 to 55), dtypes of p (56 and 57), of b (58 and 59) and
             of g (62 and 63), flags (60 and 61)
    groups   7 words each: lr, momentum, dampening, weight decay, the group's state, and two words of bytes:
             where each of the four numbers is, nesterov; maximize, scale-invariant, unbuffered
    rows     10 float64 each, in the order of texp.theory.Row
    tiles    1 word for each program of a launch: a tensor (bits 32 to 63), and which tile of it

p, g and b are addresses, 0 for none. Nothing that changes from step to step is a constant of a kernel, so that no
schedule compiles anything again.
"""

import triton
import triton.language as tl

# Addresses and counts that are multiples of 16 give 128-bit accesses.
VECTOR = tl.constexpr(16)

# Kinds of tensors, csrc/cuda.h.
FIXED, STEPPING, IDLE, STATISTIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# Flags: it has a buffer; one that has only just been made.
BUFFERED, FRESH = tl.constexpr(16), tl.constexpr(32)


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
    grad = tl.load(g + offsets, mask & has_g, other=0.0, eviction_policy="evict_first").to(T)
    buf = tl.load(b + offsets, mask & has_b, other=0.0, eviction_policy="evict_first").to(T)
    a_b, a_g, a_p = tl.load(row).to(T), tl.load(row + 1).to(T), tl.load(row + 2).to(T)
    c_u, c_g, c_p = tl.load(row + 3).to(T), tl.load(row + 4).to(T), tl.load(row + 5).to(T)
    s_p, e, r_u, r_d = tl.load(row + 6).to(T), tl.load(row + 7).to(T), tl.load(row + 8).to(T), tl.load(row + 9).to(T)
    u = _plus(a_b, buf, _plus(a_p, weight, _times(a_g, grad)))
    d = _plus(c_u, u, _plus(c_p, weight, _times(c_g, grad)))
    tl.store(p + offsets, _narrow(s_p * weight - e * d, p.dtype.element_ty), mask)
    buf = _narrow(_plus(r_d, d, r_u * u), b.dtype.element_ty)
    tl.store(b + offsets, buf, mask & has_b, eviction_policy="evict_first")


# A compiled kernel is launched again whatever it is given: nothing of its arguments is compiled in.
@triton.jit(do_not_specialize_on_alignment=["tensors", "tiles", "rows", "found_inf"])
def step(
    tensors, tiles, rows, found_inf,
    P: tl.constexpr, G: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Steps TILE elements of a tensor whose elements are of type P, those of its gradient of type G and those of its
    buffer of type B; each is converted to the type of the arithmetic, which is float64 if one of them is.

    ON_DEVICE: each tensor has a row of its own, left by `advance`, and nothing is changed if found_inf is not 0;
    otherwise the table says which row, and found_inf is not read.
    """
    if ON_DEVICE:
        if tl.load(found_inf) != 0:
            return
    WIDEST: tl.constexpr = max(P.primitive_bitwidth, G.primitive_bitwidth, B.primitive_bitwidth)
    T: tl.constexpr = tl.float64 if WIDEST == 64 else tl.float32
    tile = tl.load(tiles + tl.program_id(0))
    index, first = tile >> 32, (tile & 0xFFFFFFFF) * TILE
    tensor = tensors + 5 * index
    fields = tl.load(tensor + 4)
    kind = (fields >> 48) & 0xFF
    p, b, left = tl.load(tensor), tl.load(tensor + 2), tl.load(tensor + 3) - first
    g = tl.where(kind == STATISTIC, 0, tl.load(tensor + 1))
    row = rows + 10 * (index if ON_DEVICE else (fields >> 32) & 0xFFFF)

    count = tl.minimum(left, TILE).to(tl.int32)
    # Null pointers stay null, so that _update sees them.
    p = p + first * (P.primitive_bitwidth // 8)
    g = tl.where(g == 0, 0, g + first * (G.primitive_bitwidth // 8))
    b = tl.where(b == 0, 0, b + first * (B.primitive_bitwidth // 8))
    p_at, g_at, b_at = p.to(tl.pointer_type(P)), g.to(tl.pointer_type(G)), b.to(tl.pointer_type(B))
    if ((p | g | b) & 15) == 0:
        whole = count // VECTOR * VECTOR
        offsets = tl.arange(0, TILE)
        # Pointers of their own, for what is said of them holds in this branch only.
        aligned_p = tl.multiple_of(p.to(tl.pointer_type(P)), 16)
        aligned_g = tl.multiple_of(g.to(tl.pointer_type(G)), 16)
        aligned_b = tl.multiple_of(b.to(tl.pointer_type(B)), 16)
        _update(row, aligned_p, aligned_g, aligned_b, offsets, offsets < tl.multiple_of(whole, 16), T)
        if whole < count:
            rest = whole + tl.arange(0, VECTOR)
            _update(row, p_at, g_at, b_at, rest, rest < count, T)
    else:
        offsets = tl.arange(0, TILE)
        _update(row, p_at, g_at, b_at, offsets, offsets < count, T)


@triton.jit
def _number(group, i: tl.constexpr, where):
    """A hyperparameter: given, or at an address, as csrc/cuda.h `Number`."""
    word = tl.load(group + i)
    value = word.to(tl.float64, bitcast=True)
    if where == 1:
        value = tl.load(word.to(tl.pointer_type(tl.float32))).to(tl.float64)
    if where == 2:
        # Half by half: up to 3.9 at least, Triton sets the result of a load to 0 first, and of one that is as wide as
        # an address that nothing else needs, LLVM puts both into one register. It is then address 0 that is read.
        halves = word.to(tl.pointer_type(tl.uint32))
        low, high = tl.load(halves).to(tl.int64), tl.load(halves + 1).to(tl.int64)
        value = (high << 32 | low).to(tl.float64, bitcast=True)
    return value


@triton.jit
def _clipped(kappa, limit):
    return tl.minimum(tl.maximum(kappa, 0.0), limit)


@triton.jit(
    do_not_specialize_on_alignment=[
        "groups", "first_of_group", "tensors", "rows", "started", "grad_scale", "found_inf",
    ]
)  # fmt: skip
def advance(groups, first_of_group, tensors, rows, started, grad_scale, found_inf, BLOCK: tl.constexpr):
    """Computes the rows of one group's tensors, and advances its P and κ: texp.theory.advance, in float64.

    Changes nothing if found_inf is not 0. first_of_group: where the tensors of each group begin, and of the last end.
    """
    if tl.load(found_inf) != 0:
        return
    group = groups + 7 * tl.program_id(0)
    flags = tl.load(group + 5)
    lr, momentum = _number(group, 0, flags & 0xFF), _number(group, 1, (flags >> 8) & 0xFF)
    dampening, weight_decay = _number(group, 2, (flags >> 16) & 0xFF), _number(group, 3, (flags >> 24) & 0xFF)
    nesterov, maximize = ((flags >> 32) & 0xFF) != 0, ((flags >> 40) & 0xFF) != 0
    scale_invariant, unbuffered = ((flags >> 48) & 0xFF) != 0, ((flags >> 56) & 0xFF) != 0
    state = tl.load(group + 4).to(tl.pointer_type(tl.float64))
    counts = tl.load(group + 4).to(tl.pointer_type(tl.int64))
    P, kappa, exponent, begun = tl.load(state), tl.load(state + 1), tl.load(counts + 2), tl.load(counts + 3)
    first = unbuffered | (begun == 0)

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
    sign = tl.where(maximize, -1.0, 1.0) / tl.load(grad_scale).to(tl.float64)
    heavy_ball = direct == 0  # then d = u, and α·u + κc·η·d is u itself
    idle_a_p = alpha * (kappa - kappa_c / alpha) / P2
    r_u, r_d = tl.where(heavy_ball, 1.0, alpha) / shrink, tl.where(heavy_ball, 0.0, kappa_c * lr) / shrink

    kind_with_momentum = tl.where(plain, -1, STEPPING)  # the interpreter cannot broadcast a comparison of floats
    at, end = tl.load(first_of_group + tl.program_id(0)), tl.load(first_of_group + tl.program_id(0) + 1)
    while at < end:
        i = at + tl.arange(0, BLOCK)
        mask = i < end
        fields = tl.load(tensors + 5 * i + 4, mask, other=0)
        power = tl.load(tensors + 5 * i + 1, mask, other=0).to(tl.float64, bitcast=True)
        kind, slot = (fields >> 48) & 0xFF, fields & 0xFFFFFFFF
        buffered, fresh = ((fields >> 56) & BUFFERED) != 0, ((fields >> 56) & FRESH) != 0
        known = tl.load(started + slot, mask & buffered & (fresh == 0), other=0) != 0
        unstarted = buffered & (known == 0)
        steps, idle = kind == STEPPING, kind == IDLE
        starts = (kind == kind_with_momentum) & unstarted
        runs = steps & (starts == 0)
        # Powers 1 and 2, those of means and variances behind one layer, are exact products.
        grown = tl.exp(tl.where(kind == STATISTIC, power, 0.0) * tl.log(growth))
        grown = tl.where(power == 1, growth, tl.where(power == 2, growth * growth, grown))

        a_b = tl.where(runs, keep, tl.where(idle, alpha, 0.0))
        a_g = tl.where(runs, enter * sign, tl.where(starts, sign, 0.0))
        a_p = tl.where(runs, kappa_running, kappa_first) - kappa_c
        # The buffer of a tensor that has not taken its first step stays 0.
        a_p = tl.where(steps, a_p / P2, tl.where(idle & (unstarted == 0), idle_a_p, 0.0))
        row = rows + 10 * i
        tl.store(row, a_b, mask)
        tl.store(row + 1, a_g, mask)
        tl.store(row + 2, a_p, mask)
        tl.store(row + 3, tl.where(steps, through, 0.0), mask)
        tl.store(row + 4, tl.where(steps, direct * sign, 0.0), mask)
        tl.store(row + 5, tl.where(steps, (mu - mu_c) / P2, 0.0), mask)
        tl.store(row + 6, tl.where(steps, shrink, tl.where(idle, growth, grown)), mask)
        tl.store(row + 7, tl.where(steps, P2 * lr / alpha * shrink, 0.0), mask)
        tl.store(row + 8, tl.where(steps, r_u, tl.where(idle, 1 / shrink, 0.0)), mask)
        tl.store(row + 9, tl.where(steps, r_d, 0.0), mask)
        tl.store(started + slot, 1, mask & (kind == kind_with_momentum) & buffered)
        at += BLOCK

    tl.debug_barrier()  # all threads have read the state
    tl.store(state, P / alpha * shrink)
    tl.store(state + 1, kappa_c / alpha)
    tl.store(counts + 2, exponent + tl.where(halves, 1, 0))
    tl.store(counts + 3, tl.where(((unbuffered == 0) & (begun != 0)) | (momentum != 0), 1, 0))
