"""A trained model at use: it reads dialogues, answers in words, and renders what it wrote between video marks.

Batched, jitted, and built on the same rows as training. Knows nothing of configs or files.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, repeat

import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax import rng
from g4v_jax.data.pack import RowShape, single
from g4v_jax.data.text import VIDEO, VIDEO_END, Render, Tokenizer, Turn, dialogue
from g4v_jax.diffusion import sampler
from g4v_jax.diffusion.process import process
from g4v_jax.infer.decode import empty_caches, extend, unstack
from g4v_jax.infer.greedy import bucket, follow
from g4v_jax.models.gpt4video import GPT4Video
from g4v_jax.sharding import gathered, put_whole_batch
from g4v_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """How answers are decoded (greedily) and clips sampled."""

    rows: int = 32  # dialogues at a time
    max_tokens: int = 48  # of an answer
    steps: int = 24  # of the flow's integration
    guidance: float = 2.0
    time_shift: float = 1.0
    false_refusals: float = 0.02  # budget on validation data, from which the hazard threshold is chosen
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model made of a dialogue: its words, the caption it wants to render, and its hazard score."""

    text: str
    caption: str | None  # between <video> marks; None where it renders nothing
    hazard: float  # probability that the last user turn is hazardous
    cut: int = 0  # tokens of the dialogue that did not fit a row


@dataclasses.dataclass
class Assistant:
    """Model, parameters and tokenizer, ready for use. `threshold`: hazard scores above it close the gate.

    Where there are several processes, all call with the same arguments and get the same results.
    """

    model: GPT4Video
    params: dict
    tokenizer: Tokenizer
    shape: RowShape
    spec: SampleSpec
    mesh: jax.sharding.Mesh
    threshold: float = 0.5

    def hazards(self, dialogues: Sequence[Sequence[Turn]]) -> np.ndarray:
        """Hazard scores f32 [n] alone, of dialogues that end with a user's turn; nothing is answered."""
        return np.array([reply.hazard for reply in self._answer(dialogues, 1)], np.float32)

    def answer(self, dialogues: Sequence[Sequence[Turn]]) -> list[Reply]:
        """Answer dialogues that end with a user's turn, greedily.

        Raises UserError where one does not fit a row.
        """
        return self._answer(dialogues, self.spec.max_tokens)

    def _answer(self, dialogues: Sequence[Sequence[Turn]], limit: int) -> list[Reply]:
        """Answers of `limit` tokens at most."""
        replies = []
        for part in self._parts(dialogues):
            turns = [[dataclasses.replace(t, hazard=0) if t.role == "user" else t for t in d] for d in part]
            counts = [Counter() for _ in turns]
            batch = self._batch(turns, counts)
            last = np.maximum(np.sum(batch.hazard_label >= 0, axis=1) - 1, 0)
            with jax.set_mesh(self.mesh):
                tokens, hazard = _answer(
                    self.model, self.spec.max_tokens, self._stops, self.params, self._put(batch), np.int32(limit)
                )
            tokens, hazard = np.asarray(tokens), np.asarray(hazard)
            for row in range(len(part)):
                replies.append(self._reply(tokens[row], float(hazard[row, last[row]]), counts[row]["cut_tokens"]))
        return replies

    def render(
        self, dialogues: Sequence[Sequence[Turn]], gate: bool = True, seed: int | None = None, bare: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Render the clip of each dialogue, whose last turn is the assistant's with a `Render`.

        Where the hazard score of the request is above the threshold, the gate replaces the condition, and the model
        renders its blocked card; `gate=False` skips that. `bare` leaves the condition away, for a baseline. Returns
        (u8 [n T H W 3], whether the gate closed bool [n]).
        """
        clips, blocked = [], []
        key = rng.stream(self.spec.seed if seed is None else seed, "sample")
        for number, part in enumerate(self._parts(dialogues)):
            batch = self._batch([_label_request(turns) for turns in part])
            noise_keys = rng.row_keys(jax.random.fold_in(key, number), batch.tokens.shape[0])
            threshold = self.threshold if gate else 2.0  # a probability never reaches 2
            with jax.set_mesh(self.mesh):
                video, closed = _render(
                    self.model, self.spec, self.params, self._put(batch), noise_keys, threshold, bare
                )
            clips.append(np.asarray(video)[: len(part)])
            blocked.append(np.asarray(closed)[: len(part)])
        return np.concatenate(clips), np.concatenate(blocked)

    def whole(self, dialogues: Iterable[Sequence[Turn]]) -> Iterator[tuple[int, Batch]]:
        """Dialogues that are not to be answered, one a row, in batches on the mesh: (how many of its rows are used, batch).

        Each has one slot of every kind. Raises UserError where one does not fit a row.
        """
        shape = dataclasses.replace(self.shape, rows=self.spec.rows, clips=1, targets=1, hazards=1)
        rest = iter(dialogues)
        while part := list(islice(rest, shape.rows)):
            yield len(part), self._put(single([dialogue(turns, self.tokenizer, shape) for turns in part], shape))

    @property
    def _stops(self) -> tuple[int, int]:
        return self.tokenizer.stop, self.tokenizer.ids[VIDEO_END]

    def _parts(self, items: Sequence):
        return [items[i : i + self.spec.rows] for i in range(0, len(items), self.spec.rows)]

    def _batch(self, dialogues: Sequence[Sequence[Turn]], counts: Iterable[Counter | None] = repeat(None)) -> Batch:
        shape = dataclasses.replace(self.shape, rows=self.spec.rows)
        examples = [dialogue(t, self.tokenizer, shape, open=True, counts=c) for t, c in zip(dialogues, counts)]
        tokens = bucket(max(len(one["tokens"]) for one in examples))
        clips = max(1, max(len(one["clips"]) for one in examples))
        targets = max(1, max(len(one["gen_targets"]) for one in examples))
        hazards = max(1, self.shape.hazards)  # always as many: they cost nothing, and another shape is another program
        return single(
            examples, dataclasses.replace(shape, tokens=tokens, clips=clips, targets=targets, hazards=hazards)
        )

    def _put(self, batch: Batch) -> Batch:
        return put_whole_batch(batch, self.mesh)

    def _reply(self, tokens: np.ndarray, hazard: float, cut: int = 0) -> Reply:
        ids, tokens = self.tokenizer.ids, tokens.tolist()
        ended = next((i for i, token in enumerate(tokens) if token in self._stops), len(tokens))
        words, stop = tokens[:ended], tokens[ended] if ended < len(tokens) else None
        caption = None
        if ids[VIDEO] in words:
            start = words.index(ids[VIDEO])
            if stop == ids[VIDEO_END]:
                caption = self.tokenizer.decode(words[start + 1 :]).strip()
            words = words[:start]
        return Reply(self.tokenizer.decode(words).strip(), caption, hazard, cut)


def to_render(request: Sequence[Turn], reply: Reply) -> list[Turn]:
    """The dialogue whose clip is to be rendered: a request and the reply's words and caption."""
    return [*request, Turn("assistant", reply.text, render=Render(reply.caption or ""))]


def _label_request(turns: Sequence[Turn]) -> list[Turn]:
    """Ask for a hazard reading at the last user turn alone."""
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    return [
        dataclasses.replace(turn, hazard=0 if i == last else -1) if turn.role == "user" else turn
        for i, turn in enumerate(turns)
    ]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(model: GPT4Video, max_tokens: int, stops: tuple[int, ...], params: dict, batch: Batch, limit: jax.Array):
    """Greedy decoding with a KV cache, until a stop or `limit` tokens -> tokens i32 [B max_tokens], hazard f32 [B E].

    Past its end a row repeats its last token.
    """
    rows, length = batch.tokens.shape
    layers = unstack(params["llm"]["layers"])  # once, not for every token
    lengths = jnp.sum(batch.segments > 0, axis=1)

    def call(method, *args):
        return model.apply({"params": params}, *args, method=method)

    def read(x, start, caches):
        x, caches = extend(model.llm, layers, x, start, caches)
        return call(lambda m, h: m.llm.norm(h), x), caches

    def pick(m, hidden):
        return jnp.argmax(m.llm.logits(hidden[:, None])[:, 0], axis=-1).astype(jnp.int32)

    x = call(lambda m, b: m.embed(b), batch)
    hidden, caches = read(x, None, empty_caches(model.llm, rows, length + max_tokens, x.dtype))
    hazard = jax.nn.sigmoid(call(lambda m, h, at: m.hazard_logits(h, at), hidden, batch.hazard_position))
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    token = call(pick, last)

    def advance(token, places, caches):
        hidden, caches = read(call(lambda m, t: m.llm.embed(t[:, None], m.dtype), token), places, caches)
        return call(pick, hidden[:, 0]), caches

    return gathered((follow(advance, token, caches, lengths, max_tokens, stops, limit), hazard))


@partial(jax.jit, static_argnums=(0, 1))
def _render(
    model: GPT4Video, spec: SampleSpec, params: dict, batch: Batch, keys: jax.Array, threshold: float, bare: bool
):
    """Sample one clip a row -> (u8 [B T H W 3], gate closed bool [B])."""

    def call(method, *args):
        return model.apply({"params": params}, *args, method=method)

    reading = call(lambda m, b: m.read(b), batch)
    hazard = jax.nn.sigmoid(call(lambda m, h, at: m.hazard_logits(h, at), reading.hidden, batch.hazard_position))
    closed = jnp.any((hazard > threshold) & (batch.hazard_label >= 0), axis=1)
    states = call(lambda m, r, b: m.query_states(r, b), reading, batch)
    last = jnp.maximum(jnp.sum(batch.gen_mask, axis=1) - 1, 0)  # a talk may have rendered clips before
    states = states[jnp.arange(len(last)), last]

    def condition(drop):
        drops = jnp.full(closed.shape, drop) | bare
        return call(lambda m, s, d, b: m.conditioner(s, d, b), states, drops, closed & ~drops)

    context = jnp.concatenate([condition(False), condition(True)])

    def velocity(x, t):
        both = call(lambda m, *a: m.denoise(*a), jnp.concatenate([x, x]), jnp.concatenate([t, t]), context)
        return sampler.guide(*jnp.split(both, 2), spec.guidance)

    latent_shape = model.autoencoder.latent_shape(*batch.gen_targets.shape[2:5])
    noise = jax.vmap(lambda key: jax.random.normal(key, latent_shape))(keys)
    latents = process(model.denoiser.prediction, spec.time_shift).sample(velocity, noise, spec.steps)
    return gathered((call(lambda m, z: m.autoencoder.decode_normalised(z), latents), closed))
