"""Images: loaders, their fixed splits, the IDX parser; rotation against closed forms and SciPy."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from mechlab.data import Source, images, load_digits, load_images, load_mnist, rotate_images

# First labels of the fixed test splits. Published results depend on them: they must not change with the
# version of jax, its default generator or the machine.
DIGITS_LABELS = [2, 3, 0, 5, 3, 7, 7, 3, 4, 6, 1, 7]
MNIST_LABELS = [0, 6, 3, 5, 3, 8, 4, 6, 1, 3, 3, 3]


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data on this machine: an empty MECHLAB_DATA (returned) and an empty cache."""
    monkeypatch.setenv("MECHLAB_DATA", str(tmp_path / "given"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "given"


def idx(x: np.ndarray) -> bytes:
    """An IDX file of bytes, not compressed."""
    return bytes((0, 0, 8, x.ndim)) + struct.pack(f">{x.ndim}I", *x.shape) + x.astype(np.uint8).tobytes()


def plant_mnist(folder: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, constant: str, n: int) -> None:
    """A small stand-in for the MNIST files: both branches of the loader run without the real ones."""
    rng = np.random.default_rng(n)
    (folder / "mnist").mkdir(parents=True, exist_ok=True)
    files = {}
    for kind, x in (
        ("images-idx3", rng.integers(0, 256, (n, 28, 28))),
        ("labels-idx1", np.arange(n) % 10),
    ):
        raw = idx(x)
        name = f"{prefix}-{kind}-ubyte.gz"
        (folder / "mnist" / name).write_bytes(gzip.compress(raw))
        files[name] = ("http://127.0.0.1:9/" + name, hashlib.sha256(raw).hexdigest())
    monkeypatch.setattr(images, constant, Source(name="mnist", files=files))


def check_images(loaded: images.Images) -> None:
    for x, y in ((loaded.train_x, loaded.train_y), (loaded.test_x, loaded.test_y)):
        assert x.dtype == np.float32 and y.dtype == np.int32
        assert len(x) == len(y) and x.ndim == 3
        assert x.min() == 0 and x.max() == 1
        assert set(y.tolist()) == set(range(10))


def test_digits_are_whole_and_split_once() -> None:
    from sklearn import datasets

    loaded = load_digits()
    check_images(loaded)
    assert loaded.train_x.shape == (1200, 8, 8) and loaded.test_x.shape == (597, 8, 8)
    assert loaded.name == "digits" and "1,200/597" in loaded.note and "seed 0" in loaded.note
    whole, _ = datasets.load_digits(return_X_y=True)
    rejoined = np.concatenate([loaded.train_x, loaded.test_x]).reshape(-1, 64) * 16
    assert sorted(map(tuple, rejoined)) == sorted(map(tuple, whole))


def test_digits_keep_their_labels() -> None:
    from sklearn import datasets

    whole, labels = datasets.load_digits(return_X_y=True)
    by_pixels = dict(zip(map(bytes, whole.astype(np.float32)), labels.tolist(), strict=True))
    loaded = load_digits()
    assert [by_pixels[bytes(x.reshape(64) * 16)] for x in loaded.test_x] == loaded.test_y.tolist()


def test_the_fixed_split_is_the_same_everywhere() -> None:
    assert load_digits().test_y[:12].tolist() == DIGITS_LABELS
    with jax.default_prng_impl("rbg"):
        assert load_digits().test_y[:12].tolist() == DIGITS_LABELS


def test_real_mnist_test_images_are_split_8000_2000(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (data_dir / "mnist" / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip("MECHLAB_DATA has no MNIST test images")
    if (data_dir / "mnist" / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip("MECHLAB_DATA has the training images too")
    monkeypatch.setenv("XDG_CACHE_HOME", str(data_dir / "no-such-folder"))
    loaded = load_images("auto")
    check_images(loaded)
    assert loaded.train_x.shape == (8000, 28, 28) and loaded.test_x.shape == (2000, 28, 28)
    assert loaded.name == "mnist" and "8,000/2,000 by seed 0" in loaded.note
    # The published class counts of the test set.
    counts = np.bincount(np.concatenate([loaded.train_y, loaded.test_y])).tolist()
    assert counts == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert loaded.test_y[:12].tolist() == MNIST_LABELS


def test_mnist_as_published_when_the_training_files_are_here(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_mnist(nowhere, monkeypatch, "train", "MNIST_TRAIN", 30)
    plant_mnist(nowhere, monkeypatch, "t10k", "MNIST_TEST", 20)
    loaded = load_mnist(download=False)
    check_images(loaded)
    assert len(loaded.train_x) == 30 and len(loaded.test_x) == 20
    assert loaded.train_y.tolist() == (np.arange(30) % 10).tolist()
    assert "60,000" in loaded.note


def test_only_test_files_are_split_without_touching_the_network(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_mnist(nowhere, monkeypatch, "t10k", "MNIST_TEST", 50)
    monkeypatch.setattr(images, "_MNIST_TEST_SIZES", (30, 20))
    loaded = load_mnist()
    check_images(loaded)
    assert len(loaded.train_x) == 30 and len(loaded.test_x) == 20
    assert load_images("auto").name == "mnist"


def test_damaged_training_file_is_not_passed_over(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_mnist(nowhere, monkeypatch, "train", "MNIST_TRAIN", 30)
    plant_mnist(nowhere, monkeypatch, "t10k", "MNIST_TEST", 20)
    (nowhere / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="train-images"):
        load_mnist(download=False)


def test_auto_takes_digits_where_there_is_no_mnist(nowhere: Path) -> None:
    loaded = load_images("auto")
    assert loaded.name == "digits" and "digits" in loaded.note
    assert load_images("digits").note == loaded.note


def test_mnist_absent_and_not_to_be_downloaded(nowhere: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        load_mnist(download=False)


def test_unknown_set_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r'"minst".*Did you mean "mnist"'):
        load_images("minst")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (idx(np.ones((2, 3)))[:-1], "needs 18 bytes, the file holds 17"),
        (idx(np.ones((2, 3))) + b"\0", "needs 18 bytes, the file holds 19"),
        (idx(np.ones((2, 3)))[:9], "header is truncated"),
        (idx(np.ones((2, 3, 4))), "wanted an IDX file of bytes with 2 axes, magic 00000802, got 00000803"),
        (b"", r"magic 00000802, got \."),
    ],
    ids=["too short", "too long", "short header", "other axes", "empty"],
)
def test_broken_idx_files_are_refused_by_name(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "broken.gz"
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(ValueError, match=message) as caught:
        images._read_idx(path, axes=2)
    assert str(path) in str(caught.value)


def test_truncated_gzip_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.gz"
    path.write_bytes(gzip.compress(idx(np.ones((2, 3))))[:-9])
    with pytest.raises(ValueError, match=r"broken\.gz: not a whole gzip file"):
        images._read_idx(path, axes=2)


def test_idx_keeps_row_order(tmp_path: Path) -> None:
    x = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx(x)))
    np.testing.assert_array_equal(images._read_idx(tmp_path / "x.gz", axes=3), x)


def noise(*shape: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), shape)


@pytest.mark.parametrize("shape", [(8, 8), (3, 28, 28), (2, 2, 7, 7)])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3, 4, -1])
def test_quarter_turns_equal_rot90_counter_clockwise(shape: tuple[int, ...], quarters: int) -> None:
    x = noise(*shape)
    # numpy.rot90 turns the first axis towards the second: counter-clockwise with rows pointing down.
    wanted = np.rot90(x, quarters, axes=(-2, -1))
    np.testing.assert_allclose(rotate_images(x, 90 * quarters), wanted, atol=2e-5)


def test_zero_degrees_is_the_identity_to_the_bit() -> None:
    x = noise(3, 28, 28)
    np.testing.assert_array_equal(rotate_images(x, 0), x)


def test_full_turn_is_the_identity() -> None:
    x = np.pad(noise(3, 20, 20), ((0, 0), (4, 4), (4, 4)))
    np.testing.assert_allclose(rotate_images(x, 360), x, atol=1e-5)


@pytest.mark.parametrize("degrees", [45.0, 17.0, -60.0, 200.0])
@pytest.mark.parametrize("shape", [(28, 28), (21, 30)])
def test_rotation_equals_scipy(degrees: float, shape: tuple[int, int]) -> None:
    # A black border: the two libraries treat the half pixel beyond the outermost row differently.
    x = np.pad(noise(shape[0] - 4, shape[1] - 4), 2)
    wanted = scipy.ndimage.rotate(
        np.asarray(x, np.float64), degrees, axes=(0, 1), reshape=False, order=1, mode="constant"
    )
    np.testing.assert_allclose(rotate_images(x, degrees), wanted, atol=2e-5)


@given(degrees=st.floats(-720, 720))
def test_rotated_pixels_stay_in_range(degrees: float) -> None:
    y = rotate_images(jnp.ones((9, 9)), degrees)
    assert float(y.min()) >= 0 and float(y.max()) <= 1 + 1e-5


@given(degrees=st.floats(-180, 180))
def test_total_intensity_of_centred_digits_is_kept(degrees: float) -> None:
    row, column = np.mgrid[:28, :28] - 13.5
    ring = np.exp(-((np.hypot(row, column * 1.5) - 6) ** 2) / 4).astype(np.float32)
    assert abs(float(rotate_images(ring, degrees).sum()) / ring.sum() - 1) < 0.02


def test_total_intensity_of_real_digits_is_kept(data_dir: Path) -> None:
    if not (data_dir / "mnist" / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip("MECHLAB_DATA has no MNIST test images")
    x = load_mnist(download=False).test_x
    ratio = np.asarray(rotate_images(x, 45).sum((1, 2))) / x.sum((1, 2))
    # A handful of the 2,000 reach into the corners, or are thin strokes right along the grid.
    assert (np.abs(ratio - 1) < 0.02).mean() > 0.99
    np.testing.assert_allclose(ratio.mean(), 1, atol=0.001)


def test_jit_vmap_and_a_batch_of_angles_agree_with_single_calls() -> None:
    x, angles = noise(3, 10, 10), jnp.array([0.0, 30.0, 77.0])
    alone = jnp.stack([rotate_images(one, angle) for one, angle in zip(x, angles, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(rotate_images))(x, angles), alone, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(lambda: rotate_images(np.asarray(x), 30))(), rotate_images(x, 30))


def test_gradients_equal_finite_differences() -> None:
    with jax.enable_x64(True):
        check_grads(lambda x: rotate_images(x, 33.0), (noise(6, 6),), order=1, modes=["fwd", "rev"])
    row, column = np.mgrid[:12, :12] - 5.5
    blob = np.exp(-((row - 2) ** 2 + (column / 2) ** 2) / 8).astype(np.float32)
    weights = jnp.asarray(column / 10, jnp.float32)

    def moved(degrees: jax.Array) -> jax.Array:
        return (rotate_images(blob, degrees) * weights).sum()

    slope = (moved(jnp.float32(34.0)) - moved(jnp.float32(32.0))) / 2
    np.testing.assert_allclose(jax.grad(moved)(jnp.float32(33.0)), slope, rtol=0.05)


def test_dtype_is_kept() -> None:
    assert rotate_images(noise(4, 4).astype(jnp.bfloat16), 45).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(4, np.float32), r"shape \(4,\)"),
        (np.zeros((0, 4, 4), np.float32), r"shape \(0, 4, 4\)"),
        (np.zeros((4, 4), np.uint8), "dtype uint8"),
        (np.full((4, 4), 255.0, np.float32), r"in \[0, 1\], got values from 255"),
        (np.full((4, 4), -0.1, np.float32), "got values from -0.1"),
        (np.full((4, 4), np.nan, np.float32), "got values from nan"),
    ],
)
def test_bad_images_are_refused(x: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"x: wanted .*{message}"):
        rotate_images(x, 45)


def test_several_angles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"degrees: wanted one angle, got shape \(2,\)"):
        rotate_images(noise(2, 4, 4), jnp.array([1.0, 2.0]))
