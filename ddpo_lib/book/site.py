"""The notebooks as a site that opens from the disk: `make book`. No notebook is executed.

Sphinx, whose settings are in docs/conf.py, reads a folder that leads to the checkout and has two
pages more: the README with a table of contents, and a gallery of what the notebooks have made.
"""

import functools
import html
import re
import shutil
import sys
import tempfile
from pathlib import Path

from ddpo_lib.book import figures, paths

CHAPTERS = {
    "Start": "01", "2 · Diffusion models": "2", "3 · Reinforcement learning": "3",
    "4 · Denoising as decisions": "4", "5 · Finetuning": "5", "6 · Methods": "6",
    "7 · Text to image": "7", "8 · Findings": "8", "Appendices": "ABCD",
}  # fmt: skip
"""Chapter → what the numbers of its notebooks, figures and tables begin with."""

APPENDICES = ("58_galleries", "59_development_set")

NUMBER = r"[1-9A-D]\.\d+"
MENTION = re.compile(rf"((?:Figure|Table)s?\s{NUMBER}(?:(?:,\s|\sand\s|–){NUMBER})*|\({NUMBER}\))")
"""In the text: "Figures 5.4, 5.6 and 5.9", "Table 5.1", or an equation's "(4.3)"."""


def build(out: Path) -> None:
    """Replace the folder by the site. If Sphinx warns of anything, say so and leave it."""
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "source"), Path(folder, "made")
        source.mkdir()
        for entry in paths.ROOT.iterdir():
            if entry.name in ("notebooks", "docs", "benchmarks"):  # pages may not be behind links
                shutil.copytree(entry, source / entry.name)
            elif not entry.name.startswith((".", "build", "book")):
                (source / entry.name).symlink_to(entry)
        (source / "index.md").write_text(front_page(), encoding="utf-8")
        (source / "gallery.md").write_text(gallery(), encoding="utf-8")
        options = ["-q", "-W", "--keep-going", "-c", str(paths.ROOT / "docs"), "-d", f"{folder}/d"]
        if build_main([*options, str(source), str(made)]):
            sys.exit("Nothing was made: Sphinx's warnings above say why.")
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(made, out)


def notebooks() -> dict[str, list[str]]:
    """Chapter → its notebooks."""
    names = sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb"))
    first = {name: "A" if name in APPENDICES else name[0] for name in names}
    return {title: [n for n in names if first[n] in own] for title, own in CHAPTERS.items()}


def front_page() -> str:
    """The README, and a table of contents for the sidebar."""
    contents = {title: [f"notebooks/{n}" for n in names] for title, names in notebooks().items()}
    contents["More"] = ["gallery", "docs/fidelity", "benchmarks/README"]
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    for title, pages in contents.items():
        if pages:
            text += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {title}", *pages, "```\n"])
    return text


def artefacts() -> list[dict]:
    """The manifest's entries of profile toy, in the order of their numbers."""

    def place(entry):
        *kind, number = entry["id"].split()
        chapter, _, rest = number.partition(".")
        return chapter[0], kind, int(rest or chapter)

    return sorted((e for e in figures.manifest() if e["profile"] == "toy"), key=place)


def gallery() -> str:
    """A page of all artefacts, by chapter, with what they were made from."""
    lines = ["# Gallery", "Every figure and table, and what it was made from. A click enlarges."]
    made = artefacts()
    for title, first in CHAPTERS.items():
        own = [entry for entry in made if entry["id"].split()[-1][0] in first]
        lines += [f"## {title}"] * bool(own) + [line for entry in own for line in _shown(entry)]
    return "\n".join(lines)


def _shown(entry: dict) -> list[str]:
    name, notebook, files = entry["name"], entry["notebook"], entry["files"]
    content = f"```{{image}} figures/{files[0]}\n:alt: {name}\n:width: 100%\n:loading: lazy\n```"
    if files[0].endswith(".csv"):
        import pandas as pd

        table = pd.read_csv(paths.FIGURES / files[0])
        rows = table.to_html(index=False, na_rep="", float_format="{:.4g}".format, border=0)
        content = f'<div class="table">{" ".join(rows.split())}</div>'
    kind, _, number = entry["id"].rpartition(" ")
    title = f"{kind.capitalize() or 'Figure'} {number}"
    file = f"[{Path(files[-1]).suffix[1:].upper()}](figures/{files[-1]})"
    is_there = (paths.NOTEBOOKS / f"{notebook}.ipynb").exists()
    source = f"[{notebook}](notebooks/{notebook}.ipynb)" if is_there else f"{notebook}, now renamed"
    facts = ""
    for key in ("parameters", "seed", "source_runs", "versions"):
        value = re.sub(r"[][{}']", "", str(entry[key])) or "none"
        facts += f"<dt>{key.replace('_', ' ')}</dt><dd>{html.escape(value)}</dd>"
    return [
        f"\n:::{{container}} artefact\n:name: {name}\n\n{content}\n",
        f"**{title}** `{name}`<br>{source}, {file}\n",
        f"<details><summary>Made from</summary><dl>{facts}</dl></details>\n:::",
    ]


@functools.cache
def equations() -> list[tuple[str, str]]:
    """Pages and the numbers of the equations that they show, in order."""
    files = [paths.NOTEBOOKS / f"{name}.ipynb" for name in sum(notebooks().values(), [])]
    return [(f"notebooks/{f.stem}", n) for f in files for n in _tags(f.read_text(encoding="utf-8"))]


def _tags(text: str) -> list[str]:
    return re.findall(NUMBER, " ".join(re.findall(r"\\tag\{(.*?)\}", text)))


def setup(app) -> None:
    """For Sphinx: numbers of figures, tables and equations in the text become links."""
    from ipython_pygments_lexers import IPython3Lexer

    app.add_lexer("python", IPython3Lexer)  # knows the shell commands in the cells for Colab
    app.connect("doctree-resolved", _link)


def _link(app, tree, page: str) -> None:
    from docutils import nodes

    for formula in tree.findall(nodes.math_block):
        formula["ids"] += [f"equation-{number}" for number in _tags(formula.astext())]
    # Of the pages that show an equation the first counts, or this one.
    shown = sorted(equations(), key=lambda each: each[0] != page)
    where = {f"({n})": (on, f"equation-{n}") for on, n in reversed(shown)}
    where |= {entry["id"]: ("gallery", entry["name"].replace("_", "-")) for entry in artefacts()}
    not_here = (nodes.title, nodes.reference, nodes.literal, nodes.literal_block, nodes.math)
    for text in [t for t in tree.findall(nodes.Text) if not isinstance(t.parent, not_here)]:
        pieces = []
        for mention in MENTION.split(text):
            kind = "table " if mention.startswith("Table") else ""
            for piece in re.split(rf"((?:[FT]\w+\s)?\(?{NUMBER}\)?)", mention):
                pieces.append(nodes.Text(piece))
                number = kind + "".join(piece.split()[-1:])
                if MENTION.fullmatch(mention) and number in where:
                    on, anchor = where[number]
                    uri = f"{app.builder.get_relative_uri(page, on)}#{anchor}"
                    pieces[-1] = nodes.reference("", piece, refuri=uri, internal=True)
        text.parent.replace(text, pieces)


if __name__ == "__main__":
    build(paths.OUTPUT / "book")
    print(f"Open {paths.shown(paths.OUTPUT / 'book/index.html')} in a browser.")
