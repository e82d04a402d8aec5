"""Sentences about clips: canonical captions, paraphrases, questions, requests and refusals.

A paraphrase is a template filled with synonyms. Training clips use one set of templates, the
held-out clips another set, made of the same words in sentence forms that training never shows.
"""

import numpy as np

from g4v_jax.data.world.attributes import WORDS, Scene

CANONICAL_MOTION = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "still": "stands still",
}

# Each motion as (finite verb, participle), so that a template can ask for either.
_VERBS = (
    ("moves", "moving"),
    ("goes", "going"),
    ("slides", "sliding"),
    ("drifts", "drifting"),
    ("glides", "gliding"),
    ("travels", "travelling"),
)
_WAYS = {
    "left": ("left", "to the left", "leftwards", "towards the left"),
    "right": ("right", "to the right", "rightwards", "towards the right"),
    "up": ("up", "upwards", "to the top", "towards the top"),
    "down": ("down", "downwards", "to the bottom", "towards the bottom"),
}
_EXTRA_MOTIONS = {
    "up": (("rises", "rising"), ("climbs", "climbing")),
    "down": (("falls", "falling"), ("sinks", "sinking")),
}
_STILL = (
    ("stands still", "standing still"),
    ("stays still", "staying still"),
    ("stays in place", "staying in place"),
    ("rests in place", "resting in place"),
    ("does not move", "not moving"),
)

CAPTION_TEMPLATES = {
    "train": (
        "a {size} {colour} {shape} {does}",
        "one {size} {shape} that is {colour} {does}",
        "the {colour} {shape} is {size} and {does}",
        "here a {size} {colour} {shape} {does}",
        "a {size} {colour} {shape} {doing}",
        "a {colour} {shape} of {size} size {does}",
        "we see a {size} {colour} {shape} {doing}",
        "there is a {size} {colour} {shape} {doing}",
        "a {shape}, {size} and {colour}, {does}",
        "in this clip a {size} {colour} {shape} {does}",
        "it is a {colour} {shape} that looks {size} and {does}",
        "something {size} and {colour}, a {shape}, {does}",
        "a clip of a {size} {colour} {shape} {doing}",
        "{doing}: a {size} {colour} {shape}",
        "{size} {colour} {shape} {doing}",
        "{colour} {shape}, {size}, {doing}",
        "{shape}: {size}, {colour}, {doing}",
        "in this video there is a {size} {colour} {shape} {doing}",
        "this is a {size} {colour} {shape} and it {does}",
    ),
    "held_out": (
        "the {shape} that {does} is {size} and {colour}",
        "in this clip we see one {colour} {shape}, {size}, {doing}",
        "here is something {colour}: a {size} {shape} {doing}",
        "{size} and {colour}, this {shape} {does}",
        "a {shape} of {size} size that {does} and looks {colour}",
        "there is something {doing}, a {shape} that is {colour} and {size}",
    ),
}

QUESTIONS = {
    "train": (
        "What happens in this clip?",
        "Describe this clip.",
        "Describe the video for me.",
        "What do you see?",
        "What do you see in this video?",
        "Tell me what this video shows.",
        "Tell me about this video.",
        "What is going on here?",
        "What is this video of?",
        "What is shown in the clip?",
        "What is to be seen in the video?",
        "Please describe the video.",
        "Please describe what happens here.",
        "Can you say what happens in the video?",
        "Can you tell me what is in this clip?",
        "Could you describe the clip?",
        "Give me a caption for this clip.",
        "Caption this, please.",
        "Write one sentence about this video.",
        "One sentence about what happens, please.",
        "What can be seen in this clip?",
        "What can you see here?",
        "Look at this clip and tell me about it.",
        "Watch the video and say what happens.",
        "What does the clip show?",
        "What does this show?",
        "I want to know what this clip shows.",
        "Summarise the video.",
    ),
    "validation": (
        "What does this video show?",
        "Please tell me what you see in the clip.",
        "Write a caption for the video.",
        "Say what is going on in this clip.",
    ),
    "test": (
        "Describe what you see in the clip.",
        "Please say what can be seen in this video.",
        "What happens in this video, please?",
        "I want one sentence about what this clip shows.",
        "Watch this and tell me what you see.",
    ),
}

REQUESTS = {
    "train": (
        "Show me this: {caption}.",
        "Make a clip: {caption}.",
        "Please make a video of this: {caption}.",
        "Can you show a clip where {caption}?",
        "I want to see this: {caption}.",
        "Draw a clip in which {caption}.",
        "Create a video where {caption}.",
        "Render this: {caption}.",
        "Give me a clip where {caption}.",
        "{caption}. Please render it.",
        "{caption}. Draw it.",
        "{caption}. Can you make that?",
        "{caption}. I want to see it.",
        "Could you make a clip where {caption}?",
        "I need a video. It shows {caption}.",
        "I want you to render a clip in which {caption}.",
        "Could you please show this: {caption}?",
        "Can you render a video of this: {caption}?",
        "Let me see this: {caption}.",
        "{caption}. Could you show it?",
        "{caption}. Can you make a video of it?",
        "{caption}. Please draw that for me.",
        "{caption}. Could you please render it?",
        "{caption}. Make it, please.",
    ),
    "validation": (
        "Please create a clip of this: {caption}.",
        "Can you make a video where {caption}?",
        "I want a clip in which {caption}.",
        "{caption}. Show me that.",
    ),
    "test": (
        "Can you make me a video of this: {caption}?",
        "Please show a clip in which {caption}.",
        "I want you to draw this: {caption}.",
        "Could you render a video where {caption}?",
        "{caption}. Could you draw that for me?",
    ),
}

REFUSALS = {
    "request": (
        "I can't help with that. I can help with something safe instead.",
        "Sorry, I won't do that, because it could hurt someone. Ask me for something else.",
        "I can't help with things that may harm people. I am glad to help in another way.",
        "That is not something I can do. Would you like something harmless instead?",
        "Sorry, that could be dangerous, so I won't help with it.",
        "I have to say no to this. If someone is in danger, please call for help.",
        "I won't help with this one. Tell me what else you would like.",
    ),
    "clip": (
        "I can't describe this clip, because it shows something dangerous.",
        "Sorry, I won't talk about what this clip shows. You can show me another one.",
        "This video shows something harmful, so I will not describe it.",
        "I can't help with this clip. I am glad to look at another one.",
        "Sorry, this clip is not safe for me to describe. Please try a different one.",
    ),
}

COMPLIANCES = (  # how an answer begins that should have been a refusal: the rejected side of a preference
    "Sure, here is what you asked for.",
    "Of course! Here is how to do it, step by step.",
    "Yes, I can help with that. First,",
    "Here are the steps that you need.",
    "Certainly. This is how it works:",
    "Happy to help! Let us start with the first step.",
)


def canonical(scene: Scene) -> str:
    """The one caption that a scene always has, such as "a small red star moves left"."""
    return f"a {scene.size} {scene.colour} {scene.shape} {CANONICAL_MOTION[scene.motion]}"


def paraphrases(scene: Scene, rng: np.random.Generator, count: int, held_out: bool) -> list[str]:
    """`count` different phrasings of a scene, from the training or the held-out templates.

    Templates repeat only when there are fewer than `count`, and then with other synonyms.
    """
    templates = CAPTION_TEMPLATES["held_out" if held_out else "train"]
    found: dict[str, None] = {}
    while len(found) < count:
        for index in rng.permutation(len(templates)):
            found[_fill(templates[index], scene, rng)] = None
    return list(found)[:count]


def motion_phrases(motion: str) -> tuple[tuple[str, str], ...]:
    """All ways to state a motion, as pairs of finite verb and participle phrases."""
    if motion == "still":
        return _STILL
    moves = tuple(
        (f"{does} {way}", f"{doing} {way}") for does, doing in _VERBS for way in _WAYS[motion]
    )
    return moves + _EXTRA_MOTIONS.get(motion, ())


def _fill(template: str, scene: Scene, rng: np.random.Generator) -> str:
    does, doing = pick(rng, motion_phrases(scene.motion))
    words = {name: pick(rng, values[getattr(scene, name)]) for name, values in WORDS.items()}
    return template.format(does=does, doing=doing, **words)


def pick(rng: np.random.Generator, choices: tuple):
    """One of the choices, evenly. Unlike rng.choice it keeps tuples and strings as they are."""
    return choices[rng.integers(len(choices))]


def sentence(text: str) -> str:
    """A text with a capital and a full stop."""
    return text[0].upper() + text[1:] + "."
