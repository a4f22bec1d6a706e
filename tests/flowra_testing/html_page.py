"""Pages that must need nothing but themselves."""

import re
from html.parser import HTMLParser

VOID = {"meta", "path", "use", "br"}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and whether they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def attribute(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements for key, value in attributes.items() if key == name and value]


def assert_self_contained(html: str) -> Page:
    """Assert that nothing is loaded, linked or run, and that what leads somewhere leads there inside the page."""
    page = Page(html)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form", "img", "foreignobject"}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert not names & {"src", "srcset", "action", "formaction", "background", "ping"}
    places = set(page.attribute("id"))
    assert len(places) == len(page.attribute("id"))
    targets = [*page.attribute("href"), *page.attribute("xlink:href")]
    assert targets
    inline = "data:image/png;base64,"
    assert [each for each in targets if each[1:] not in places and not each.startswith(inline)] == []
    assert all(each.startswith(("#", inline)) for each in targets)
    markup = "".join(re.findall(r"<[^>]*>|<style>.*?</style>", html, flags=re.DOTALL))
    assert "://" not in markup
    urls = re.findall(r"url\(([^)]*)\)", markup)
    assert [each for each in urls if not each.startswith("#") or each[1:] not in places] == []
    assert "default-src 'none'" in page.attribute("content")[0]
    return page
