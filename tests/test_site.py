"""The book: nothing is left out and no link is dead; every page is looked at in a real browser.

The slow tests build the book. The last of them needs Chromium (`apt-get install chromium`):

    .venv/bin/python -m pytest -m slow tests/test_site.py
"""

import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import browser
import pytest

from ddpo_lib.book import figures, paths, site

NOTEBOOKS = sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb"))
SOURCES = [paths.ROOT / "README.md", paths.ROOT / "docs" / "fidelity.md"]
SOURCES += [paths.NOTEBOOKS / f"{name}.ipynb" for name in NOTEBOOKS]


def test_every_notebook_is_in_the_contents():
    assert sorted(sum(site.notebooks().values(), [])) == NOTEBOOKS
    listed = re.findall(r"^notebooks/(\w+)$", site.front_page(), re.MULTILINE)
    assert sorted(listed) == NOTEBOOKS


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_links_lead_somewhere(file):
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)\s]*\)", text)
    assert [target for target in targets if not (file.parent / target).exists()] == []


def test_gallery_shows_every_artefact():
    shown = re.findall(r"^:name: (\w+)$", site.gallery(), re.MULTILINE)
    made = [entry["name"] for entry in figures.manifest() if entry["profile"] == "toy"]
    assert sorted(shown) == sorted(made)
    assert "**Table A.1**" in site.gallery() and "**Figure 5.10**" in site.gallery()
    assert shown.index("fig_5_9_transition_aesthetic") < shown.index("fig_5_10_age_distribution")


def test_equations_have_a_page():
    assert ("notebooks/40_denoising_as_mdp", "4.4") in site.equations()
    assert ("notebooks/30_policy_gradients", "3.1") in site.equations()  # two in one tag


class Page(HTMLParser):
    """The links, assets and ids of a page."""

    def __init__(self, file):
        super().__init__()
        self.links, self.assets, self.ids = [], [], {""}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if tag == "a":
            self.links.append(given.get("href", ""))
        elif "src" in given or (tag == "link" and "href" in given):
            self.assets.append(given.get("src") or given["href"])


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    out = tmp_path_factory.mktemp("project") / "book"
    site.build(out)
    return out


@pytest.fixture(scope="module")
def pages(book):
    return {file: Page(file) for file in sorted(book.rglob("*.html")) if "_static" not in str(file)}


@pytest.mark.slow
def test_book_is_whole_and_needs_no_other_host(book, pages):
    names = {f"notebooks/{name}" for name in NOTEBOOKS}
    names |= {"index", "gallery", "docs/fidelity", "search"}
    assert {str(page.relative_to(book).with_suffix("")) for page in pages} >= names
    for file, page in pages.items():
        assert [each for each in page.assets if re.match(r"\w+:|//", each)] == [], file
        for link in [*page.links, *page.assets]:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert target.exists(), f"{file}: {link}"
            if target in pages and parts.fragment:
                assert unquote(parts.fragment) in pages[target].ids, f"{file}: {link}"
    for style in (book / "_static").rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text()), style


@pytest.mark.slow
def test_numbers_in_the_text_are_links(book):
    text = (book / "notebooks" / "50_finetune.html").read_text(encoding="utf-8")
    assert re.search(r'<a class="reference internal" href="#equation-4.1">\(4.1\)</a>', text)
    assert 'id="equation-4.1"' in text
    text = (book / "notebooks" / "20_forward_process.html").read_text(encoding="utf-8")
    assert 'href="../gallery.html#fig-2-1-forward-process"' in text


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.tab(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


LOOK = r"""(async () => {
    await window.MathJax?.startup?.promise;
    const images = [...document.images], text = document.body.cloneNode(true);
    images.forEach(image => image.loading = 'eager');
    await Promise.allSettled(images.map(image => image.decode()));
    text.querySelectorAll('pre, code, script, mjx-container').forEach(each => each.remove());
    return {
        formulas: document.querySelectorAll('.math').length
            - document.querySelectorAll('.math mjx-container').length,
        errors: document.querySelectorAll('[data-mml-node=merror], [data-mjx-error]').length,
        raw: text.textContent.match(/\\[a-zA-Z]+|\\[()[\]]|\$/g) ?? [],
        images: images.filter(image => !image.naturalWidth).map(image => image.src),
    };
})()"""


@pytest.mark.slow
@browser.needs_chromium
def test_every_page_in_a_browser(book, pages, tab):
    tab.call("Network.enable")
    for file in pages:
        tab.call("Page.navigate", url=file.as_uri())
        tab.wait_for(f"location.href === '{file.as_uri()}' && document.readyState === 'complete'")
        tab.wait_for("!document.querySelector('.math') || !!window.MathJax?.startup?.promise")
        found = tab.evaluate(LOOK)
        assert found == {"formulas": 0, "errors": 0, "raw": [], "images": []}, file
    tab.call("Page.navigate", url=(book / "search.html").as_uri() + "?q=REINFORCE")
    tab.wait_for("!!document.querySelector('#search-results a[href*=\"30_policy_gradients\"]')")
    requests = [e["params"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert len(requests) > len(pages)
    assert {urlsplit(each["request"]["url"]).scheme for each in requests} <= {"file", "data"}
