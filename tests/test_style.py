"""The figures of how the code reads stay within their limits.

    pytest tests/test_style.py
"""
import style

LIMITS = {
    "lines of train_gpt2.py": 600, "mean length of its lines": 59.9, "line of its first nn.Module": 150,
    "line where its loop begins": 499, "lines of the loop's body": 45, "nesting of its loops": 2,
    "local names of the function that trains": 25, "top-level files": 6, "lines of hellaswag.py": 400,
    "lines of fineweb.py": 450, "lines of generate.py, export_hf.py, plot.py, at most": 180,
    "lines of a function, at most": 60, "parameters of a function, at most": 7, "public names without a docstring": 0,
    "lines of README.md": 150, "words of README.md": 1300,
}


def test_each_figure_is_within_its_limit():
    figures = style.figures()
    assert figures.keys() == LIMITS.keys()
    assert {name: figure for name, figure in figures.items() if figure > LIMITS[name]} == {}
