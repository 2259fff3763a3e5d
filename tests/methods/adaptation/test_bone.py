"""Bone's variants against peft's layer and an independent NumPy reference, their identities, and what they refuse."""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.core import select
from mechlab.core.transforms import AdapterState, on_state
from mechlab.methods.adaptation import bone

VARIANTS = {
    "bone_col": bone.bone_col(4),
    "bone_row": bone.bone_row(4),
    "bone_ab": bone.bone_ab(4),
    "bone_free": bone.bone_free(4),
    "guide_only": bone.guide_only(4),
    "miss": bone.miss(4),
    "miss_mini": bone.miss_mini(4, 2),
}


@pytest.fixture
def v(vectors):
    return vectors("bone")


def border(weight):
    """The papers' W (out, in) as our kernel, and back."""
    return jnp.asarray(weight).T


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(
    ("wanted", "delta"),
    [
        ("W_col", lambda k, v: bone.bone_col_delta(k, v["bone_col"])),
        ("W_row", lambda k, v: bone.bone_row_delta(k, v["bone_row"])),
        ("W_ab", lambda k, v: bone.bone_ab_delta(k, v["bone_A"], v["bone_B"])),
        ("W_free", lambda k, v: bone.bone_free_delta(k, v["bone_free"])),
        ("W_miss", lambda k, v: bone.miss_delta(v["miss"], 20, 12)),
        ("W_mini", lambda k, v: bone.miss_delta(v["miss_mini"], 20, 12)),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_vectors(v, wanted, delta, dtype, tolerance):
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(x, dtype) for name, x in v.items()}
        kernel = border(arrays["W"])
        np.testing.assert_allclose(border(kernel + delta(kernel, arrays)), v[wanted], rtol=tolerance, atol=tolerance)


def test_vectors_of_the_forwards_and_of_the_gradient(v):
    with jax.enable_x64(True):
        kernel, x = border(v["W"]), jnp.asarray(v["x"])
        np.testing.assert_allclose(bone.bone_col_forward(x, kernel, v["bone_col"]), v["y_col"], rtol=1e-11)
        np.testing.assert_allclose(bone.miss_forward(x, kernel, v["miss"]), v["y_miss"], rtol=1e-11)

        def loss(M):
            return 0.5 * ((bone.bone_col_forward(x, kernel, M) - v["target"]) ** 2).sum()

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(v["bone_col"]))
        assert float(value) == pytest.approx(float(v["loss_col"]), rel=1e-12)
        np.testing.assert_allclose(gradient, v["dloss_dbone_col"], rtol=1e-10, atol=1e-10)


@hypothesis.settings(max_examples=6)
@given(a=st.integers(1, 2), b=st.integers(2, 3), r=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_block_is_the_paper_s(a, b, r, seed):
    """Block by block in NumPy, in the paper's layout: rules out a transpose, and a reshape that mixes blocks."""
    weight = numbers(seed, a * r, b * r).astype(np.float32)
    col, row, free = (numbers(seed + i, *shape, r, r).astype(np.float32) for i, shape in enumerate(((a,), (b,), ())))
    found = {
        "col": bone.bone_col_delta(border(weight), jnp.asarray(col)),
        "row": bone.bone_row_delta(border(weight), jnp.asarray(row)),
        "free": bone.bone_free_delta(border(weight), jnp.asarray(free)),
        "guide": bone.guide_only_delta(border(weight), jnp.asarray(col)),
    }
    for i in range(a):
        for j in range(b):
            at = np.s_[i * r : (i + 1) * r, j * r : (j + 1) * r]
            block = weight[at]
            wanted = {
                "col": block @ col[i] + col[i],
                "row": block @ row[j] + row[j],
                "free": block @ free + free,
                "guide": block @ col[i],
            }
            for name, change in wanted.items():
                np.testing.assert_allclose(border(found[name])[at], change, rtol=1e-4, atol=1e-4)


def test_limiting_cases():
    kernel, M = jnp.asarray(numbers(0, 6, 6)), jnp.asarray(numbers(1, 6, 6))
    # One block: all three are W(I + M) + M.
    whole = border(border(kernel) @ M + M)
    for delta in (
        bone.bone_col_delta(kernel, M[None]),
        bone.bone_row_delta(kernel, M[None]),
        bone.bone_free_delta(kernel, M),
    ):
        np.testing.assert_allclose(delta, whole, rtol=1e-5)
    # M_a = c I: the block is scaled, and c I is added.
    scaled = bone.bone_col_delta(kernel, 0.5 * jnp.stack([jnp.eye(2)] * 3))
    np.testing.assert_allclose(scaled, 0.5 * kernel + 0.5 * jnp.tile(jnp.eye(2), (3, 3)), rtol=1e-6)
    # Tied matrices, and MiSS of full rank: any change at all.
    small = M[:2, :2]
    np.testing.assert_allclose(
        bone.bone_col_delta(kernel, jnp.stack([small] * 3)), bone.bone_free_delta(kernel, small), rtol=1e-5
    )
    np.testing.assert_array_equal(bone.miss_delta(M, 6, 6), M)


def test_rank_of_the_change():
    kernel = jnp.asarray(numbers(0, 12, 8))
    assert np.linalg.matrix_rank(bone.miss_delta(jnp.asarray(numbers(1, 2, 8)), 12, 8)) == 2
    assert np.linalg.matrix_rank(bone.bone_col_delta(kernel, jnp.asarray(numbers(1, 4, 2, 2)))) == 8


def test_gradient_at_the_start_is_the_formula_s():
    """dL/dM_a = sum_b (W_ab^T + I) G_ab, and for MiSS the sum of G over blocks; none of them is zero."""
    kernel, gradient = jnp.asarray(numbers(0, 8, 4), jnp.float32), numbers(1, 4, 8).astype(np.float32)
    loss = lambda change: (change * border(gradient)).sum()  # noqa: E731
    found = jax.grad(lambda M: loss(bone.bone_col_delta(kernel, M)))(jnp.zeros((2, 2, 2)))
    weight = np.asarray(border(kernel))
    for a in range(2):
        blocks = [np.s_[2 * a : 2 * a + 2, 2 * b : 2 * b + 2] for b in range(4)]
        wanted = sum((weight[at].T + np.eye(2)) @ gradient[at] for at in blocks)
        np.testing.assert_allclose(found[a], wanted, rtol=1e-4)
    summed = jax.grad(lambda M: loss(bone.miss_delta(M, 8, 4)))(jnp.zeros((2, 4)))
    np.testing.assert_allclose(summed, gradient.reshape(4, 4, 2).sum(1).T, rtol=1e-5)


def decoder():
    """Parameters of a decoder with grouped keys and values: q, k, v and o all have their own shape."""
    kernels = {"q": (2, 16, 4, 4), "k": (2, 16, 2, 4), "v": (2, 16, 2, 4), "o": (2, 4, 4, 16)}
    mlp = {"gate": (2, 16, 12), "up": (2, 16, 12), "down": (2, 12, 16)}

    def made(shapes):
        return {name: {"kernel": jnp.asarray(numbers(7, *shape), jnp.float32)} for name, shape in shapes.items()}

    return {"blocks": {"attn": made(kernels), "mlp": made(mlp), "norm": {"scale": jnp.ones((2, 16))}}}


COUNTS = {
    # out per layer: q, o, down 16; k, v 8; gate, up 12. in per layer: q, k, v, gate, up, o 16; down 12.
    "bone_col": 2 * 4 * (3 * 16 + 2 * 8 + 2 * 12),
    "bone_row": 2 * 4 * (6 * 16 + 12),
    "bone_ab": 2 * 2 * 4 * (6 * 16 + 12),
    "bone_free": 2 * 7 * 16,
    "guide_only": 2 * 4 * (3 * 16 + 2 * 8 + 2 * 12),
    "miss": 2 * 4 * (3 * 16 + 2 * 8 + 2 * 12),
    "miss_mini": 2 * 7 * 4 * 2,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_adapter_starts_at_the_base_and_changes_only_its_kernels(name):
    params, adapter = decoder(), VARIANTS[name]
    state = adapter.init(jax.random.key(1), params)
    assert bone.trained_numbers(adapter, params) == select.count(state.train) == COUNTS[name]
    jax.tree.map(np.testing.assert_array_equal, adapter.merge(params, state), params)
    before = jax.tree.map(np.array, params)
    moved = adapter.merge(params, jax.tree.map(lambda leaf: leaf + 0.1, state))
    for path, leaf in select.get(moved, "**").items():
        same = bool((leaf == select.get(params, path)[path]).all())
        assert same is not path.endswith("kernel"), path
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize("name", ["bone_col", "bone_row", "miss"])
def test_heads_and_channels_are_the_paper_s_rows_and_columns(name):
    """On q (D, H, K) they are outputs, on o (H, K, D) inputs: layer by layer the flat matrices change alike."""
    params, adapter = decoder(), VARIANTS[name]
    state = adapter.init(jax.random.key(1), params)
    state = jax.tree.map(lambda leaf: leaf + jnp.asarray(numbers(leaf.size, *leaf.shape), leaf.dtype), state)
    merged = adapter.merge(params, state)["blocks"]["attn"]
    of_matrix = {"bone_col": bone.bone_col_delta, "bone_row": bone.bone_row_delta}
    for part, inputs in (("q", 1), ("v", 1), ("o", 2)):
        for layer in range(2):
            kernel = params["blocks"]["attn"][part]["kernel"][layer]
            M = state.train[f"blocks/attn/{part}/kernel"]["M"][layer]
            flat = select.as_matrix(kernel, inputs=inputs)
            change = of_matrix[name](flat, M) if name in of_matrix else bone.miss_delta(M, *flat.shape)
            np.testing.assert_allclose(
                select.as_matrix(merged[part]["kernel"][layer], inputs=inputs), flat + change, rtol=1e-5, atol=1e-6
            )


def test_transformations_agree_with_the_plain_call():
    params = decoder()
    adapter = bone.bone_col(4, pattern="**/attn/[qo]/kernel")
    loss = on_state(adapter, params, lambda p: sum((x**3).sum() for x in select.get(p, "**/kernel").values()))
    state = adapter.init(jax.random.key(0), params)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.05]), state.train)
    many = jax.jit(jax.vmap(jax.grad(loss), (0, None)))(states, ())
    for lane in range(2):
        one = jax.grad(loss)(jax.tree.map(lambda leaf, i=lane: leaf[i], states), ())
        jax.tree.map(lambda a, b, i=lane: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-3), many, one)
    assert all(float(jnp.abs(leaf[0]).max()) > 0 for leaf in jax.tree.leaves(many))


def test_a_small_change_of_bfloat16_weights_is_added_in_float32():
    params = {"kernel": jnp.full((4, 4), 1.0, jnp.bfloat16)}
    adapter = bone.bone_col(2)
    state = adapter.init(jax.random.key(0), params)
    assert state.train["kernel"]["M"].dtype == jnp.bfloat16
    state = AdapterState({"kernel": {"M": jnp.full((2, 2, 2), 0.001, jnp.bfloat16)}})
    merged = adapter.merge(params, state)["kernel"]
    assert merged.dtype == jnp.bfloat16
    step = float(jnp.finfo(jnp.bfloat16).eps)
    assert float(jnp.abs(merged.astype(jnp.float32) - 1.003).max()) <= step / 2 + 1e-4


def test_unmerge_gives_the_base_back():
    with jax.enable_x64(True):
        params = {
            "one": {"kernel": jnp.asarray(numbers(0, 8, 4))},
            "many": {"kernel": jnp.asarray(numbers(1, 3, 4, 8))},
        }
        adapter = bone.bone_col(2)
        state = adapter.init(jax.random.key(0), params)
        state = jax.tree.map(lambda leaf: leaf + 0.3 * numbers(leaf.size, *leaf.shape), state)
        back = bone.bone_unmerge(adapter.merge(params, state), state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), back, params)


def test_unmerge_of_a_singular_matrix_is_refused():
    state = AdapterState({"kernel": {"M": -jnp.eye(2)[None]}})
    with pytest.raises(ValueError, match=r'I \+ M at "kernel" is singular'):
        bone.bone_unmerge({"kernel": jnp.ones((2, 2))}, state)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bone.bone_col(0), "block must be at least 1, got 0"),
        (lambda: bone.miss(0), "rank must be at least 1"),
        (lambda: bone.bone_col(5), 'blocks of 5 do not divide "kernel", a matrix of 6 inputs and 10 outputs'),
        (lambda: bone.bone_row(4), 'blocks of 4 do not divide "kernel"'),
        (lambda: bone.bone_ab(20), "blocks of 20 do not divide"),
        (lambda: bone.miss(7), 'rank 7 is above the 6 inputs of "kernel"'),
        (lambda: bone.miss_mini(2, 3), 'width 3 does not divide the 10 outputs of "kernel"'),
        (lambda: bone.bone_free(2, pattern="bias"), r"\(in, out\) or \(L, in, out\).*got shape \(10,\)"),
    ],
)
def test_bad_input_is_refused(make, words):
    params = {"kernel": jnp.ones((6, 10)), "bias": jnp.ones(10)}
    with pytest.raises(ValueError, match=words):
        make().init(jax.random.key(0), params)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(KeyError, match="kernel"):
        bone.bone_col(2, pattern="**/kernels").init(jax.random.key(0), {"kernel": jnp.ones((2, 2))})
