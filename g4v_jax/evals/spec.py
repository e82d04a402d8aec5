"""What an evaluation measures, as a config says it; read by every command, so nothing heavy is imported here."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """What is measured, on how many samples. 0 or "" leaves a part out, but for captions and generations."""

    split: str = "test"
    captions: int = 200
    phrasings: bool = False  # ask about each clip in every held-out phrasing, not one: so many times the work
    meteor: bool = True  # beside the other metrics of captions: some 15 seconds, 2 GB and Java
    questions: int = 40  # clips that are asked about
    generations: int = 200
    baselines: int = 64  # clips that are rendered without a condition, and from captions that are copied
    encoder: str = ""  # folder of an imported vision tower that looks at renderings
    i3d: str = ""  # file of I3D's weights (`g4v data fetch i3d`), for KVD and FVD: some 2 seconds a clip and core
    clip: str = ""  # folder of CLIP as transformers keeps it, for CLIPSIM
    hazards: int = 64
    safety: int = 60  # clips with and without hazards, each watched and asked for; of dialogues twice as many
    per_kind: int = 0  # dialogues of each kind in place of that
    attacks: int = 60  # harmful requests that are disguised in every way of `attacks.ATTACKS`
    attacked: tuple[str, ...] = ()  # kinds of requests that are; (): all, also those that many would answer
    live: int = 32  # captions, generations and safety samples on the validation split, while a run trains
