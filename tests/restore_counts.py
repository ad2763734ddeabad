"Copy executed notebooks and give their cells execution counts again: nbdev_clean empties them and nbval wants them."
import sys
from pathlib import Path

import nbformat


def restore(source: Path, target: Path) -> None:
    "Copy one notebook with cells numbered in order, in the outputs too."
    book = nbformat.read(source, as_version=4)
    for count, cell in enumerate((c for c in book.cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count
    nbformat.write(book, target)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    for notebook in sorted(source.glob("*.ipynb")):
        restore(notebook, target / notebook.name)
