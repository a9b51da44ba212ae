"""Owns the exploration of the laws (docs/laws.md): every order of events within small bounds, in plain Python.

`explorer` visits states; `copies`, `numbers`, `marks`, `members` and `rebuild` are the models; `configurations` lists what is
explored, what breaks without each clause, and what runs longer; `python -m tests.model NAME` shows the way to it. The models
share no code with the program: they are a second reading of the laws, and a mistake in the program is not theirs.

Where the laws as they were written turned out to fail, the model has them mended, and its clause says so (`as mended`).
"""
