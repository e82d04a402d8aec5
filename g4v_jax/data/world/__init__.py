"""The built-in world: moving sprites as H.264 clips, with captions, dialogues and hazards.

It needs no download and its ground truth is exact, so every stage of the model can be trained
and judged from nothing but a seed.
"""
