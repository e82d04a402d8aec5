"""An invisible, keyed mark of 32 bits in the brightness of a video, found again without the original.

May hold the mark's pattern, its code, and the two functions that put it in and look for it; numpy and scipy only.

The mark is a square tile of 64 pixels, the sum of waves of 6 to 16 pixels' length with phases from the key, repeated
over the picture and the same in every frame: spread-spectrum in the sense of Cox et al. (1997). A keyed quarter of the
waves is known in advance and gives scale and position (a template, after Pereira and Pun, 2000). The others carry the
payload in the signs of their two quadratures, after a convolutional code. Repetition makes a crop a cyclic shift of
the tile, and a resize a change of the tile's size; both are searched for. Mirror images, rotations and changes of the
aspect ratio are not.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.fft
from scipy.ndimage import uniform_filter

from g4v_jax.errors import UserError

PAYLOAD_BITS = 32
MIN_SIDE = 128  # pixels, of a clip to mark
MIN_FOUND_SIDE = 64  # pixels, of a clip to look at
MIN_PSNR = 40.0  # dB, of every marked frame
SCALES = (0.45, 2.2)  # resizes that are searched
MIN_SCORE = 4.5  # standard deviations

_TILE = 64  # pixels
_BAND = (4, 10)  # waves in a tile: longer ones show, shorter ones do not outlive compression and halving
_TEMPLATE = 0.25  # share of the waves
_STRENGTH = 1.2  # grey levels, rms, where the picture is flat
_BUSY = 1.0  # how much stronger the mark is, in parts of that, where the picture is busiest
_TEXTURE = 12.0  # grey levels, rms, of a picture that counts as busiest
_ROOM = 2  # grey levels that black and white give way, or the mark could only brighten the one and darken the other
_WINDOW = 9  # pixels, side of the neighbourhood that counts as local
_FLOOR = 8.0  # grey levels squared: what compression adds to a flat picture
_SEARCHED = 512  # pixels: the middle of a larger picture is enough to find scale and position
_CANDIDATES = 16  # places where a payload is read

_CHECK_BITS = 16
_MEMORY = 8  # bits of the convolutional code's state
_POLYNOMIALS = (0o557, 0o663, 0o711)  # rate 1/3, free distance 18 (Larsen, 1973)
_STEPS = PAYLOAD_BITS + _CHECK_BITS + _MEMORY


class Detection(NamedTuple):
    """What `detect` saw. The payload, the scale and the offset are None where no mark was found."""

    found: bool
    payload: int | None  # 32 bits
    score: float  # of the template, in standard deviations of an unmarked clip; at least MIN_SCORE where found
    scale: float | None  # of this clip to the marked one
    offset: tuple[float, float] | None  # rows and columns cut away, in pixels of the marked clip, modulo the tile


def embed(frames: np.ndarray, payload: int, key: bytes) -> np.ndarray:
    """Mark a clip.

    The mark is weak where the picture is flat, and up to twice as strong where texture hides it. Every frame keeps a
    PSNR of at least MIN_PSNR, rounding and clipping included: the whole mark is weakened until that is so.

    Args: u8 [T H W 3] RGB, T at least 1, H and W at least MIN_SIDE; a payload of 32 bits; a key of any length.
    Returns: u8 [T H W 3].
    Raises UserError for other frames, for a payload out of range, and for a key that is empty or not bytes.
    """
    _check(frames, key, MIN_SIDE, "mark")
    if isinstance(payload, bool) or not isinstance(payload, (int, np.integer)) or not 0 <= payload < 2**PAYLOAD_BITS:
        raise UserError(f"payload {payload!r}: give a whole number from 0 to {2**PAYLOAD_BITS - 1}")
    height, width = frames.shape[1:3]
    tile = _tile(_encode(int(payload), _pattern(key)), _pattern(key))
    mark = np.tile(tile, (-(-height // _TILE), -(-width // _TILE)))[:height, :width]
    marked, strength = np.empty_like(frames), _STRENGTH
    limit = 255**2 / 10 ** (MIN_PSNR / 10)
    while True:
        worst = 0.0
        for index, frame in enumerate(frames):
            _, deviation = _local(_luma(frame))
            masked = mark * (1 + _BUSY * np.minimum(deviation / _TEXTURE, 1))
            change = np.rint(strength * masked).astype(np.int16)[..., None]
            marked[index] = np.clip(np.clip(frame, _ROOM, 255 - _ROOM) + change, 0, 255)
            worst = max(worst, np.square(marked[index] - frame.astype(np.int16)).mean(dtype=np.float64))
        if worst <= limit:
            return marked
        strength *= 0.99 * np.sqrt(limit / worst)


def detect(frames: np.ndarray, key: bytes) -> Detection:
    """Look for a mark, and read its payload; the original is not needed.

    False positives: a mark counts as found where a reading's 16 check bits are right and its template's score is at
    least MIN_SCORE. The check bits are masked with 16 bits of the key that nothing else depends on, so a reading of an
    unmarked clip, whatever it shows, passes with a chance of 2^-16. The search looks at all scales and offsets but
    reads only the _CANDIDATES = 16 best, so an unmarked clip is found to be marked with a chance of at most
    16 * 2^-16 = 2.4e-4. The threshold of the score halves that: the best score of all scales and offsets, in unmarked
    clips, is over 4.5 in about half, over 5.0 in one of 20 and over 5.7 in none of 1,100.

    Args: u8 [T H W 3] RGB, T at least 1, H and W at least MIN_FOUND_SIDE; the key the mark was made with.
    Raises UserError for other frames, and for a key that is empty or not bytes.
    """
    _check(frames, key, MIN_FOUND_SIDE, "look at")
    pattern = _pattern(key)
    picture = _whitened(frames)
    height, width = picture.shape
    top, left = max(0, height - _SEARCHED) // 2, max(0, width - _SEARCHED) // 2
    middle = picture[top : top + _SEARCHED, left : left + _SEARCHED]
    step = 2.56 / max(128, *middle.shape)  # a step moves the picture's edge by 1.3 pixels
    grid = np.exp(np.arange(np.log(SCALES[0]), np.log(SCALES[1]), step))
    scales = np.concatenate([grid, [0.5, 0.75, 1, 1.5, 2]])
    peaks, _ = _aligned(_waves(middle, scales, pattern), pattern, 3 * _TILE // 4)
    # The best scales once more, on the whole picture and in finer steps.
    fine = step * np.array([-0.5, -0.25, 0, 0.25, 0.5])
    scales = (scales[np.argsort(-peaks)[:_CANDIDATES], None] * np.exp(fine)).ravel()
    waves = _waves(picture, scales, pattern)
    peaks, offsets = _aligned(waves, pattern, 3 * _TILE // 2)
    groups = peaks.reshape(-1, len(fine))
    kept = groups.argmax(axis=1) + np.arange(len(groups)) * len(fine)
    kept = kept[np.argsort(-peaks[kept])]
    turned = waves[kept] * np.exp(2j * np.pi / _TILE * (offsets[kept] @ np.stack([pattern.rows, pattern.columns])))
    for index, word in zip(kept, _decode(_soft(turned, pattern))):
        payload = word >> _CHECK_BITS
        if peaks[index] >= MIN_SCORE and word == _word(payload, pattern):
            offset = tuple(float(value) for value in -offsets[index] % _TILE)
            return Detection(True, payload, float(peaks[index]), float(scales[index]), offset)
    return Detection(False, None, float(peaks.max()), None, None)


def _check(frames: np.ndarray, key: bytes, side: int, what: str) -> None:
    if not isinstance(key, bytes) or not key:
        raise UserError(f"the key of the mark is {'empty' if key == b'' else type(key).__name__}; give it as bytes")
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        form = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise UserError(f"frames to {what} are {form}; give uint8 [T, H, W, 3]")
    if not len(frames) or min(frames.shape[1:3]) < side:
        count, height, width = frames.shape[:3]
        raise UserError(
            f"a clip of {count} frames of {width}x{height} pixels is too small to {what}; "
            f"give at least 1 frame of {side}x{side} (enlarge it first)"
        )


class _Pattern(NamedTuple):
    """What the key decides, and the n waves it decides about: the half plane of a tile's spectrum in the band."""

    rows: np.ndarray  # i64 [n], waves in a tile, from -_BAND[1] to _BAND[1]
    columns: np.ndarray  # i64 [n], from 0 to _BAND[1]
    turns: np.ndarray  # complex64 [n], the phase of each wave
    template: np.ndarray  # i64, the waves that are known in advance
    data: np.ndarray  # i64, the waves that carry the payload
    mask: int  # of the check bits


@functools.lru_cache(maxsize=8)
def _pattern(key: bytes) -> _Pattern:
    rows, columns = np.mgrid[-_BAND[1] : _BAND[1] + 1, 0 : _BAND[1] + 1].reshape(2, -1)
    radius = np.hypot(rows, columns)
    # Of the waves along the rows each is there twice.
    chosen = (radius >= _BAND[0]) & (radius <= _BAND[1]) & ((columns > 0) | (rows > 0))
    rows, columns = rows[chosen], columns[chosen]
    n = len(rows)
    # A hash, as no random generator promises the same numbers for ever.
    stream = hashlib.shake_256(b"g4v watermark 1:" + key).digest(9 * n + 2)
    order = np.argsort(np.frombuffer(stream, "<u8", n), kind="stable")
    angles = np.frombuffer(stream, np.uint8, n, 8 * n) * (2 * np.pi / 256)
    count = round(_TEMPLATE * n)
    mask = int.from_bytes(stream[-2:], "little")
    turns = np.exp(1j * angles).astype(np.complex64)
    return _Pattern(rows, columns, turns, order[:count], order[count:], mask)


def _tile(symbols: np.ndarray, pattern: _Pattern) -> np.ndarray:
    """The mark for coded symbols of +-1: f32 [_TILE _TILE], rms 1."""
    pairs = symbols[np.arange(2 * len(pattern.data)) % len(symbols)].reshape(-1, 2)
    waves = pattern.turns.copy()
    waves[pattern.data] *= (pairs[:, 0] + 1j * pairs[:, 1]) / np.sqrt(2)
    # Phases count from the corner of the picture, half a pixel before its first pixel: resizing keeps the corner.
    waves *= np.exp(1j * np.pi / _TILE * (pattern.rows + pattern.columns))
    tile = scipy.fft.irfft2(_half_plane(waves[None], pattern.rows, pattern.columns, _TILE))[0]
    return (tile / tile.std()).astype(np.float32)


def _half_plane(waves: np.ndarray, rows: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    """Waves [S n] as the spectra [S size size/2+1] of real pictures."""
    spectra = np.zeros((len(waves), size, size // 2 + 1), np.complex64)
    spectra[:, rows, columns] = waves
    upright = columns == 0
    spectra[:, -rows[upright], 0] = waves[:, upright].conj()
    return spectra


def _luma(frame: np.ndarray) -> np.ndarray:
    return frame @ np.array([0.299, 0.587, 0.114], np.float32)


def _local(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation in the neighbourhood of each pixel."""
    mean = uniform_filter(luma, _WINDOW)
    return mean, np.sqrt(np.maximum(uniform_filter(luma * luma, _WINDOW) - mean * mean, 0))


def _whitened(frames: np.ndarray) -> np.ndarray:
    """f32 [H W]: the mean over time of what stands out of its neighbourhood, divided by the neighbourhood's variance.

    That is a matched filter: the host is noise, strong at edges, weak on flat ground.
    """
    total = np.zeros(frames.shape[1:3], np.float32)
    for frame in frames:
        luma = _luma(frame)
        mean, deviation = _local(luma)
        total += (luma - mean) / (deviation * deviation + _FLOOR)
    return total / len(frames)


def _waves(picture: np.ndarray, scales: np.ndarray, pattern: _Pattern) -> np.ndarray:
    """The pattern's waves in a picture at each of S scales: complex64 [S n], turned back by the key's phases.

    The picture's Fourier transform is taken at just the frequencies of a tile of that size, which need not be whole
    numbers of waves in the picture. Magnitudes are compressed against the mean of waves about as long, so that no
    edge or stripe of the picture outvotes the others.
    """

    @functools.cache  # most pictures are square
    def kernel(length):  # complex64 [S, _BAND[1] + 1, length]
        places = np.arange(length, dtype=np.float32) + np.float32(0.5)
        rates = (-2 * np.pi / _TILE * np.arange(_BAND[1] + 1) / scales[:, None]).astype(np.float32)
        angles = rates[..., None] * places
        return np.cos(angles) + 1j * np.sin(angles)

    height, width = picture.shape
    across = kernel(width).reshape(-1, width).T
    across = (picture @ across.real.copy() + 1j * (picture @ across.imag.copy())).reshape(height, len(scales), -1)
    down = kernel(height)
    down = np.concatenate([down[:, :0:-1].conj(), down], axis=1)
    found = (down @ across.transpose(1, 0, 2))[:, pattern.rows + _BAND[1], pattern.columns]
    size = np.abs(found)
    rings = np.rint(np.hypot(pattern.rows, pattern.columns)).astype(int) - _BAND[0]
    members = (rings[:, None] == np.arange(rings.max() + 1)).astype(np.float32)
    usual = np.sqrt(np.square(size) @ (members / members.sum(axis=0)))
    return found * pattern.turns.conj() / (usual[:, rings] + size + np.float32(1e-12))


def _aligned(waves: np.ndarray, pattern: _Pattern, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The best place of the template at each scale: score [S], and rows and columns [S 2] in pixels of the tile.

    The score is the correlation over its standard deviation where phases are random, over `size`^2 places.
    """
    known = waves[:, pattern.template]
    spectra = _half_plane(known, pattern.rows[pattern.template], pattern.columns[pattern.template], size)
    sums = scipy.fft.irfft2(spectra).reshape(len(waves), -1) * (size * size / 2)
    places = sums.argmax(axis=1)
    spread = np.sqrt(np.square(np.abs(known)).sum(axis=1) / 2) + 1e-6
    offsets = np.stack(np.divmod(places, size), axis=1) * (_TILE / size)
    return sums[np.arange(len(sums)), places] / spread, offsets


def _soft(waves: np.ndarray, pattern: _Pattern) -> np.ndarray:
    """Waves [C n] at their place as soft symbols [C _STEPS * 3]: some symbols are carried twice, and summed."""
    carried = waves[:, pattern.data]
    pairs = np.stack([carried.real, carried.imag], axis=-1).reshape(len(waves), -1)
    soft = np.zeros((len(waves), _STEPS * len(_POLYNOMIALS)), np.float32)
    np.add.at(soft, (slice(None), np.arange(pairs.shape[1]) % soft.shape[1]), pairs)
    return soft


def _word(payload: int, pattern: _Pattern) -> int:
    """The payload and its check bits, a masked CRC-16 (CCITT)."""
    check = 0xFFFF
    for bit in _bits(payload, PAYLOAD_BITS):
        check = (check << 1) ^ (0x1021 if (check >> 15) ^ bit else 0)
        check &= 0xFFFF
    return payload << _CHECK_BITS | (check ^ pattern.mask)


def _bits(value: int, count: int) -> Iterator[int]:
    """The first bit first."""
    return (value >> place & 1 for place in reversed(range(count)))


@functools.cache
def _symbols() -> np.ndarray:
    """f32 [2^(_MEMORY+1) 3]: what the code sends, +-1, for each content of its register, the newest bit last."""
    registers = range(2 << _MEMORY)
    return np.array([[1 - 2 * ((r & p).bit_count() & 1) for p in _POLYNOMIALS] for r in registers], np.float32)


def _encode(payload: int, pattern: _Pattern) -> np.ndarray:
    """f32 [_STEPS * 3] of +-1; the register begins and ends empty."""
    register, sent = 0, []
    for bit in _bits(_word(payload, pattern) << _MEMORY, _STEPS):
        register = (register << 1 | bit) & ((2 << _MEMORY) - 1)
        sent.append(_symbols()[register])
    return np.concatenate(sent)


def _decode(soft: np.ndarray) -> list[int]:
    """The likeliest word for each row of soft symbols [C _STEPS * 3] (Viterbi, 1967)."""
    count, states = len(soft), 1 << _MEMORY
    metric = np.full((count, states), -np.inf, np.float32)
    metric[:, 0] = 0
    older = np.empty((_STEPS, count, states), np.int64)  # the bit that leaves the register on the better way here
    branches = soft.reshape(count, _STEPS, -1) @ _symbols().T
    before = np.arange(2 * states) >> 1  # the state before, for each content of the register
    for step in range(_STEPS):
        ways = (metric[:, before] + branches[:, step]).reshape(count, 2, states)
        older[step] = ways.argmax(axis=1)
        metric = ways.max(axis=1)
    words = [0] * count
    for row in range(count):
        state = 0
        for step in reversed(range(_STEPS)):
            words[row] |= (state & 1) << (_STEPS - 1 - step)
            state = (state | int(older[step, row, state]) << _MEMORY) >> 1
    return [word >> _MEMORY for word in words]
