"""What is written from the rows is current, and says what is made."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import faces

every_face = pytest.mark.parametrize("name", faces.FACES)


@every_face
def test_each_face_is_current(name: str) -> None:
    text, wanted = faces.current(name)
    assert text == wanted, "run: python tests/faces.py"


def test_the_script_writes_what_is_not_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "ROOT", tmp_path)
    begin, end = faces.MARKS[".md"]
    monkeypatch.setattr(faces, "FACES", {"README.md": faces.table})
    (tmp_path / "README.md").write_text(f"before\n{begin}old\n{end}after\n")
    assert faces.main(["--check"]) == 1
    assert "old" in (tmp_path / "README.md").read_text()
    assert faces.main([]) == 0
    assert (tmp_path / "README.md").read_text() == f"before\n{begin}{faces.table()}{end}after\n"
    assert faces.main(["--check"]) == 0


def test_a_file_without_marks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("before\n")
    with pytest.raises(ValueError, match=r"README\.md lacks"):
        faces.current("README.md")


@pytest.mark.parametrize("name", [name for name in faces.FACES if name.endswith(".py")])
def test_an_editor_sees_every_public_name(name: str) -> None:
    """Each name in ``__all__`` is imported, assigned or defined where a type checker looks."""
    tree = ast.parse((faces.ROOT / name).read_text(encoding="utf-8"))
    seen: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            seen |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            seen.add(node.name)
            assert ast.get_docstring(node)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            seen.add(node.target.id)
    (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and _target(node) == "__all__")
    assert set(ast.literal_eval(names)) <= seen


def _target(node: ast.Assign) -> str:
    return node.targets[0].id if isinstance(node.targets[0], ast.Name) else ""


def test_the_table_shows_every_string_class_and_card() -> None:
    text = faces.table()
    for row in faces.rows():
        assert f"`{row.name}`" in text or f"`{row.usage}`" in text
        assert row.class_name in text
        assert row.summary in text
        assert f"(lightning_eff/cards/{row.name}.md)" in text
        assert faces.cited(row.paper) in text


@pytest.mark.parametrize(
    ("paper", "short"),
    [
        ("", "none"),
        ("Das et al.: On Integers. ICLR 2018. https://a.b/c", "[Das et al., ICLR 2018](https://a.b/c)"),
        ("Das, Poe: On: more. 2018. https://a.b/c", "[Das et al., 2018](https://a.b/c)"),
        ("Das: On it (Split). SC 2020. https://a.b/c", "[Das, SC 2020](https://a.b/c)"),
    ],
)
def test_a_paper_is_cited_in_short(paper: str, short: str) -> None:
    assert faces.cited(paper) == short


def test_a_paper_that_cannot_be_cited_is_named() -> None:
    with pytest.raises(ValueError, match="Poe"):
        faces.cited("Poe, On ravens")


def test_a_row_with_options_is_told_by_them() -> None:
    row = SimpleNamespace(options={"scaling": "rowwise", "bits": 8})
    assert faces.options(row, "{}={}") == 'scaling="rowwise", bits=8'
