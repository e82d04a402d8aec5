"""How the model is to answer: refusals that are varied, short and helpful, and how an answer that complies would begin.

May hold text, and the choice of it. A refusal declines, and offers something close by that is safe.
"""

import re

import numpy as np

from g4v_jax.data.world.phrases import pick

DECLINES = (
    "I can't help with that.",
    "Sorry, I won't help with this.",
    "I won't do that, because it could hurt someone.",
    "I'm sorry, but I can't assist with this request.",
    "That is not something I can help with.",
    "I have to say no to this one.",
    "I can't help with things that may harm people.",
)
OFFERS = {  # by the words of a request; the first that fits
    r"suicid|self.?harm|kill (my|your|them)sel|starv|anorex|eating disorder": (
        "If you or someone near you is in danger, please call a crisis line or a person you trust.",
        "If this is about you, please talk to someone now: a friend, a doctor or a crisis line.",
    ),
    r"hack|malware|virus|phish|password|exploit|network|software|comput|website|code|cyber|keylog|ransom": (
        "I can help you to protect a system instead.",
        "I am glad to explain how to stay safe online.",
    ),
    r"bomb|weapon|gun|firearm|explosiv|poison|chemical|nuclear|biolog": (
        "I can tell you about safety or history instead.",
        "If someone is in danger, please call the police.",
    ),
    r"drug|meth|cocaine|heroin|overdose|prescription": (
        "I can tell you where to find help with drugs instead.",
        "A doctor or a pharmacist can advise you well.",
    ),
    r"steal|rob|fraud|counterfeit|forg|launder|tax|credit card|identity|insider|bank|scam|embezzl|bribe": (
        "I can explain how people protect themselves from it instead.",
        "I am glad to help with an honest way to earn or save money.",
    ),
    r"child|minor|teen|kid|bully|stalk|harass|blackmail|traffick|groom|rape|sexual": (
        "If someone is being hurt, please tell a person you trust or the police.",
        "I can tell you where victims find help instead.",
    ),
    r"hate|racis|sexis|discriminat|violen|terror|kill|murder|attack|riot|genocide|supremac|religio": (
        "I can help with words that bring people together instead.",
        "If you are angry, I am glad to listen.",
    ),
    r"fake|misinform|conspirac|rumou?r|propagand|manipulat|decei|defam|plagiar|election|news": (
        "I can help you to check facts instead.",
        "I am glad to help with an honest version.",
    ),
}
ELSE = ("Ask me for something else.", "I am glad to help in another way.", "I can help with something safe instead.")

BEGINNINGS = (  # an answer that complies, without what it would tell
    "Sure, here is what you asked for.",
    "Sure! Here is a step-by-step guide:",
    "Of course! Here is how to do it, step by step.",
    "Yes, I can help with that. First,",
    "Here are the steps that you need:",
    "Certainly. This is how it works:",
    "Happy to help! Let us start with the first step:",
    "To do this, you will need",
    "1. Start by",
)
HELPFUL = (  # of a harmless request, where no LLM is there to answer
    "Sure! Start with a plan, gather what you need, and take it step by step.",
    "Happy to help. Begin small, take your time, and ask someone with experience where you are unsure.",
    "Good question. Read a short guide first, prepare what you need, and then try it with care.",
)


def refusal(request: str, rng: np.random.Generator) -> str:
    """A refusal that fits a request."""
    offers = next((texts for words, texts in OFFERS.items() if re.search(words, request.lower())), ELSE)
    return f"{pick(rng, DECLINES)} {pick(rng, offers if rng.random() < 0.8 else ELSE)}"


def compliance(request: str, rng: np.random.Generator) -> str:
    """How an answer begins that gives a request what it asks for: it may echo the request, and tells nothing."""
    if rng.random() < 0.5:
        return pick(rng, BEGINNINGS)
    asked = request.rstrip(".?! ")
    return f"Sure, here is an answer to \"{asked[0].lower() + asked[1:]}\":"
