import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTION = re.compile(r"( *)(Args|Attributes|Raises|Returns|Yields):\n((?:\1 +\S.*\n|\n)*)")


def wrongly_indented(source):
    """The first lines of docstring sections without an indent of four spaces."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for indent, title, content in SECTION.findall(f"{ast.get_docstring(node)}\n"):
                if not content.startswith(indent + 4 * " ") or content[len(indent) + 4] == " ":
                    wrong.append(f"{getattr(node, 'name', 'module')}: {title}")
    return wrong


def test_sections_of_docstrings_are_indented_by_four_spaces():
    files = [path for folder in ("dnntk", "scripts") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path): wrong for path in files if (wrong := wrongly_indented(path.read_text()))}
    assert len(files) > 50 and not found


def test_another_indent_is_found():
    source = 'def f(x):\n    """One.\n\n    Args:\n      x: two.\n    """\n'
    assert wrongly_indented(source) == ["f: Args"]
    assert not wrongly_indented(source.replace("      x", "        x"))
