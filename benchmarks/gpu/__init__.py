"""What this project does on a GPU, measured with one command: see docs/gpu.md.

`__main__` runs the sections, each in a process of its own (`worker`), and `summary` sets the rows against the goals;
`shapes` and `timing` are what sections share; every other file is a section.
"""

ROW, LEFT_OUT, END = "@row ", "@left out ", "@end "
"""How a section's process begins the lines that are meant for the runner; all its others are log."""
