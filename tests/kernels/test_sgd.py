"""SGD in one launch, against its formulas in float64, rounded where the kernel rounds: bit for bit."""

import itertools

import pytest
import torch

from fastalex.cpu.sgd import join_halves, split_halves
from fastalex.inspection import catalog
from fastalex.kernels.geometry import is_packed
from fastalex.kernels.sgd import BLOCK, Table, sgd_

# A scalar, one element, none, whole blocks, a tail, and weights of a convolution in channels_last.
SHAPES = [(), (1,), (0, 3), (2 * BLOCK,), (BLOCK + 9,), (8, 3, 5, 5)]
OPTIONS = [
    {"momentum": 0.9, "weight_decay": 5e-4},
    {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    {"weight_decay": 5e-4, "maximize": True},
    {},
]


@pytest.fixture(scope="module")
def device(request):
    """Where the tensors lie: addresses in a table do not move with the arguments of a launch."""
    return torch.device("cuda" if request.config.getoption("--device") == "cuda" else "cpu")


def in_order(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


class Parameters:
    """Weights whole and in halves, with what their updates read and write."""

    def __init__(self, device, shapes=SHAPES, scale=1.0):
        self.weights = [in_order(scale * torch.randn(shape)).to(device) for shape in shapes]
        halves = [split_halves(weight) for weight in self.weights]
        self.highs, self.lows = ([half[i] for half in halves] for i in range(2))
        self.buffers = [torch.full_like(weight, torch.nan) for weight in self.weights]
        self.expected = [(weight.clone(), torch.full_like(weight, torch.nan)) for weight in self.weights]

    def grads(self, dtype=torch.bfloat16):
        return [torch.randn_like(weight).to(dtype) for weight in self.weights]

    def step(self, grads, *, split, **options):
        """An update by the kernel, and the one that is expected of it."""
        sgd_(
            self.highs if split else self.weights,
            [grad.clone() for grad in grads],
            self.buffers if options.get("momentum") else None,
            self.lows if split else None,
            **options,
        )
        options.pop("table", None)
        self.expected = [formula(w, g, m, **options) for (w, m), g in zip(self.expected, grads, strict=True)]

    def found(self, split):
        return [join_halves(*pair) for pair in zip(self.highs, self.lows, strict=True)] if split else self.weights

    def check(self, split, momentum=0.9):
        for weight, buffer, (w, m) in zip(self.found(split), self.buffers, self.expected, strict=True):
            assert weight.stride() == w.stride()
            assert_same(weight, w)
            if momentum:
                assert_same(buffer, m)
        if split:
            for high, (w, _) in zip(self.highs, self.expected, strict=True):
                assert_same(high, split_halves(w)[0])


def assert_same(actual, expected):
    """Equal bits, but for NaN's."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def formula(
    w,
    g,
    m,
    *,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    first=False,
    factor=None,
):
    """(weight, momentum buffer) after a step, in float64 and rounded to fp32 as the kernel's header says."""
    g = -g.double() if maximize else g.double()
    if weight_decay:
        g = (g + weight_decay * w.double()).float().double()
    if factor is not None:
        g = (g.float() * factor).double()
    step = g
    if momentum:
        step = g if first else momentum * m.double() + (1 - dampening) * g
        m = step.float()
        step = (g + momentum * step).float().double() if nesterov else m.double()
    return (w.double() - lr * step).float(), m


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("split", "dtype"),
    [(True, torch.bfloat16), (False, torch.float32), (False, torch.bfloat16), (False, torch.float16)],
)
def test_values(split, dtype, options, device):
    parameters = Parameters(device)
    table = Table()
    for i in range(3):
        parameters.step(parameters.grads(dtype), split=split, lr=0.1 / (i + 1), first=i == 0, table=table, **options)
        parameters.check(split, options.get("momentum"))


@pytest.mark.parametrize("nesterov", [False, True])
def test_torchs_fused_update(nesterov, device):
    """Bit for bit on a GPU; on a CPU, which rounds products and keeps its constants in fp32, for powers of two."""
    if nesterov and device.type == "cpu":
        pytest.skip("on a CPU, PyTorch rounds the buffer before it looks ahead")
    options = {"lr": 2.0**-5, "momentum": 0.5, "weight_decay": 2.0**-9, "nesterov": nesterov}
    if device.type == "cuda":
        options |= {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    ours = Parameters(device, [(BLOCK + 9,), (8, 3, 5, 5)])
    theirs = [torch.nn.Parameter(weight.clone()) for weight in ours.weights]
    optimizer = torch.optim.SGD(theirs, fused=True, **options)
    for i in range(10):
        grads = ours.grads(torch.float32)
        ours.step(grads, split=i % 2 == 1, first=i == 0, **options)
        if i % 2:  # the whole weights and the halves take turns
            ours.weights = ours.found(True)
        else:
            halves = [split_halves(weight) for weight in ours.weights]
            ours.highs, ours.lows = ([half[j] for half in halves] for j in range(2))
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        for weight, buffer, parameter in zip(ours.weights, ours.buffers, theirs, strict=True):
            assert_same(weight, parameter.detach())
            assert_same(buffer, optimizer.state[parameter]["momentum_buffer"])


@pytest.mark.filterwarnings("ignore:.* encountered")
def test_infinities_and_nan(device):
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, 0.0, -0.0, 1.0], device=device)
    grads = special.repeat_interleave(len(special))
    for split, decay in itertools.product((False, True), (0.0, 0.1)):
        parameters = Parameters(device, [grads.shape])
        weights = special.repeat(len(special))
        if split:  # bf16 has no number there: it rounds to infinity, and is infinity from then on
            weights = join_halves(*split_halves(weights))
        parameters.weights[0].copy_(weights)
        for half, value in zip((parameters.highs[0], parameters.lows[0]), split_halves(weights), strict=True):
            half.copy_(value)
        parameters.expected = [(weights, parameters.buffers[0])]
        parameters.step([grads], split=split, lr=0.5, weight_decay=decay)
        w = parameters.expected[0][0]
        parameters.expected = [(join_halves(*split_halves(w)) if split else w, parameters.buffers[0])]
        parameters.check(split, momentum=0)


# ---- the halves


def patterns():
    """fp32 numbers of all kinds: random bits, and neighbours of the ends of bf16's intervals."""
    ends = torch.arange(-(2**15), 2**15, dtype=torch.int64) * 2**16
    near = torch.cat([ends + offset for offset in (-(2**15) - 1, -(2**15), -(2**15) + 1, -1, 0, 1, 2**15 - 1, 2**15)])
    bits = torch.cat([torch.randint(-(2**31), 2**31, (100_000,)), near]).clamp(-(2**31), 2**31 - 1)
    return bits.int().view(torch.float32)


def test_halves_are_the_weight():
    w = patterns()
    high, low = split_halves(w)
    assert high.dtype == torch.bfloat16
    assert low.dtype == torch.int16
    joined = join_halves(high, low)
    kept = high.isfinite()
    assert torch.equal(joined[kept].view(torch.int32), w[kept].view(torch.int32))
    assert torch.equal(high.isnan(), w.isnan())
    # beyond bf16's largest number and half of its last bit there is infinity alone
    assert (w[high.isinf() & w.isfinite()].abs() >= 3.3961775e38).all()
    # PyTorch's casts send ties to even
    tie = (w.view(torch.int32) & 0xFFFF) == 0x8000
    assert_same(high[~tie], w[~tie].bfloat16())
    away = high[tie & kept].double() - w[tie & kept].double()
    assert (away.sign() == w[tie & kept].double().sign()).all()


def test_the_kernels_halves_are_these(device):
    """lr = 0: the kernel puts weights together and takes them apart."""
    w = patterns()[::13].to(device)
    w = w[w.isfinite()]
    high, low = split_halves(w)
    before = high.clone(), low.clone()
    sgd_([high], [torch.zeros_like(high)], None, [low], lr=0.0)
    kept = before[0].isfinite()
    assert torch.equal(high.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(low[kept], before[1][kept])


def test_whatever_is_written_into_the_upper_half_counts(device):
    """Every lower half goes with every number: what is written is what the next step rounds to."""
    written = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -3.0, 3.3895e38], device=device
    ).bfloat16()
    low = torch.tensor([0, 1, -1, 2**15 - 1, -(2**15)], dtype=torch.int16, device=device)
    high, low = (x.contiguous() for x in (written.repeat_interleave(len(low)), low.repeat(len(written))))
    expected = high.clone()
    assert_same(split_halves(join_halves(high, low))[0], expected)
    sgd_([high], [torch.zeros_like(high)], None, [low], lr=0.0)
    assert_same(high, expected)


# ---- memory


def test_odd_addresses(device):
    """Views that begin anywhere are updated in the same way, and what lies around them is not touched."""
    count = 2 * BLOCK + 5
    names = ("weights", "highs", "lows", "buffers")
    for split in (False, True):
        whole, parts = Parameters(device, [(count + 8,)] * 3), Parameters(device, [(count,)] * 3)
        before = {name: [x.clone() for x in getattr(whole, name)] for name in names}
        for name in names:
            setattr(parts, name, [x[1 + i : 1 + i + count] for i, x in enumerate(getattr(whole, name))])
        parts.expected = [(weight.clone(), torch.full_like(weight, torch.nan)) for weight in parts.weights]
        parts.step(parts.grads(), split=split, lr=0.1, momentum=0.9, first=True)
        parts.check(split)
        for name in names:
            for i, (now, then) in enumerate(zip(getattr(whole, name), before[name], strict=True)):
                for edge in (slice(0, 1 + i), slice(1 + i + count, None)):
                    assert_same(now[edge], then[edge])


def test_offsets_beyond_32_bits(device, monkeypatch):
    """The last programs of a tensor of more than 2^31 elements, of which only these have memory."""
    before = 2**31 // BLOCK + 3  # programs
    weight, grad = torch.randn(2 * BLOCK + 7, device=device), torch.randn(2 * BLOCK + 7, device=device)
    expected, _ = formula(weight, grad, None, lr=0.1)
    update = Table.update

    def shifted(self, sizes, rows, numbers, device):
        [(_, size, *addresses)] = rows
        skipped = before * BLOCK * 4
        addresses = [address - skipped if address else 0 for address in addresses]
        return update(self, sizes, ((-before, size + before * BLOCK, *addresses),), numbers, device)

    monkeypatch.setattr(Table, "update", shifted)
    sgd_([weight], [grad], lr=0.1)
    assert_same(weight, expected)


def test_grid_of_huge_tensors():
    sizes = (2**33, 5, 2**32 + 1)
    with catalog.recording() as launches:
        weights = [torch.empty(size, device="meta") for size in sizes]
        sgd_(weights, weights, lr=0.1)
    [launch] = launches
    programs = [-(-size // BLOCK) for size in sizes]
    assert launch.grid == (sum(programs),)


def test_tables_follow_tensors_that_move(device):
    """New gradients, weights and numbers in every step."""
    check_moving(device)


def test_a_stale_table_is_noticed(device, monkeypatch):
    update = Table.update

    def once(self, *args):
        self.kept = getattr(self, "kept", None) or update(self, *args)
        return self.kept

    monkeypatch.setattr(Table, "update", once)
    with pytest.raises(AssertionError):
        check_moving(device)


def check_moving(device):
    parameters, table, kept = Parameters(device), Table(), []
    for i in range(4):
        grads = parameters.grads()
        kept += [grads, parameters.weights]  # nobody else gets their memory
        if i == 2:
            parameters.weights = [weight.clone() for weight in parameters.weights]
        sgd_(parameters.weights, grads, parameters.buffers, lr=0.1 + i // 2, momentum=0.9, first=i == 0, table=table)
        parameters.expected = [
            formula(w, g, m, lr=0.1 + i // 2, momentum=0.9, first=i == 0)
            for (w, m), g in zip(parameters.expected, grads, strict=True)
        ]
        parameters.check(split=False)


def test_a_captured_launch_keeps_what_it_reads(monkeypatch):
    """Without a GPU: what a capture allows and forbids is played here."""
    capturing, to = [True], torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda x: pytest.fail("in a capture") if capturing[0] else x.clone()
    )
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda x, where, **options: x.clone() if isinstance(where, torch.device) else to(x, where, **options),
    )
    table, numbers = Table(), (0.9, 1.0, 0.0, 0.1)

    def update(address):
        return table.update((5,), ((0, 5, address, 0, 0, 32),), numbers, torch.device("cuda"))

    with pytest.raises(RuntimeError, match="take a step before the capture"):
        update(16)
    capturing[0] = False
    _, values, found = update(16)
    assert values.tolist() == [0, 5, 16, 0, 0, 32]
    assert found.tolist() == list(numbers)
    capturing[0] = True
    assert update(16)[1].data_ptr() == values.data_ptr()
    _, captured, _ = update(48)
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        update(64)
    capturing[0] = False
    assert update(80)[1].tolist() == [0, 5, 80, 0, 0, 32]
    # a replay copies from what was staged
    assert [kept.tolist()[:6] for _, kept, _ in table.captured] == [[0, 5, 16, 0, 0, 32], [0, 5, 48, 0, 0, 32]]
    assert table.captured[1][2].tolist()[:6] == captured.tolist() == [0, 5, 48, 0, 0, 32]


# ---- what the device knows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_on_the_device(dtype, device):
    lr = torch.tensor(0.1, dtype=dtype, device=device)
    parameters, table = Parameters(device), Table()
    for rate in (0.1, 0.01):
        lr.fill_(rate)
        grads = parameters.grads()
        sgd_(parameters.weights, grads, lr=lr, table=table)
        parameters.expected = [
            formula(w, g, m, lr=lr.double()) for (w, m), g in zip(parameters.expected, grads, strict=True)
        ]
        parameters.check(split=False, momentum=0)


def test_factors(device):
    parameters = Parameters(device)
    factors = torch.rand(len(SHAPES), device=device)
    grads = parameters.grads()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "first": True}
    sgd_(parameters.weights, grads, parameters.buffers, factors=factors, **options)
    parameters.expected = [
        formula(w, g, m, factor=factor, **options)
        for (w, m), g, factor in zip(parameters.expected, grads, factors, strict=True)
    ]
    parameters.check(split=False)


@pytest.mark.parametrize("split", [False, True])
def test_loss_scaling(split, device):
    """Gradients are divided, in memory too; nothing happens where one of them was infinite."""
    one, eight = torch.ones(1, device=device), torch.full((1,), 8.0, device=device)
    parameters = Parameters(device)
    grads = parameters.grads()
    scaled = [8 * grad for grad in grads]
    weights, lows = (parameters.highs, parameters.lows) if split else (parameters.weights, None)
    sgd_(weights, scaled, None, lows, lr=0.1, grad_scale=eight, found_inf=one)
    parameters.check(split, momentum=0)
    sgd_(weights, scaled, None, lows, lr=0.1, grad_scale=eight, found_inf=0 * one)
    parameters.expected = [formula(w, g, m, lr=0.1) for (w, m), g in zip(parameters.expected, grads, strict=True)]
    parameters.check(split, momentum=0)
    for divided, grad in zip(scaled, grads, strict=True):
        assert_same(divided, grad)


# ---- refusals


def test_refusals(device):
    x = torch.zeros(4, 4, device=device)
    low = x.to(torch.int16)
    for message, args, options in [
        ("nesterov needs momentum", ([x], [x]), {"nesterov": True}),
        ("nesterov needs momentum", ([x], [x], [x]), {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        ("momentum_buffers go with a momentum, got 1 and 0.0", ([x], [x], [x]), {}),
        ("momentum_buffers go with a momentum, got 0 and 0.9", ([x], [x]), {"momentum": 0.9}),
        ("grads must be as many as weights, 1, got 2", ([x], [x, x]), {}),
        ("grads must be fp16, bf16 or fp32, got torch.float64", ([x], [x.double()]), {}),
        (r"weights\[0\] must be torch.float32", ([x.double()], [x]), {}),
        (r"weights\[0\] must be torch.bfloat16", ([x], [x], None, [low]), {}),
        (r"lows\[0\] must be torch.int16", ([x.bfloat16()], [x], None, [x]), {}),
        (r"momentum_buffers\[0\] must be torch.float32", ([x], [x], [x.half()]), {"momentum": 0.9}),
        (r"grads\[0\] must lie as weights\[0\]", ([x], [x.T]), {}),
        (r"weights\[0\] must be packed", ([x[:, ::2]], [x[:, ::2]]), {}),
        (r"weights\[0\] and weights\[1\] share memory", ([x, x], [x, x]), {}),
        (r"share memory", ([x.view(-1)[:9], x.view(-1)[8:]], [torch.zeros(9), torch.zeros(8)]), {}),
        ("lr must have 1 elements", ([x], [x]), {"lr": torch.zeros(2)}),
        ("factors must have 1 elements", ([x], [x]), {"factors": torch.zeros(2)}),
        ("lr must have 1 elements on", ([x], [x]), {"lr": torch.zeros(1, device="meta")}),
    ]:  # fmt: skip
        args = tuple([y.to(device) for y in arg] if arg else arg for arg in args)
        with pytest.raises(ValueError, match=message):
            sgd_(*args, **{"lr": 0.1, **options})


def test_nothing_to_do(device):
    sgd_([], [], lr=0.1)
    empty = torch.zeros(0, 3, device=device)
    sgd_([empty], [empty], lr=0.1)


def test_packed():
    x = torch.zeros(4, 3, 5, 5)
    for packed in (x, x.to(memory_format=torch.channels_last), x.permute(3, 1, 0, 2), x[:, :1, :1, :1][:1], x[:0]):
        assert is_packed(packed)
    for other in (x[:, :2], x[..., ::2], torch.zeros(1).expand(3), torch.zeros(9).as_strided((2, 2, 2), (1, 1, 5))):
        assert not is_packed(other)
