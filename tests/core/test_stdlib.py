"""The standard library as text: excluded files, held-out files, prompts."""

from __future__ import annotations

from itertools import islice

from spectool.examples.stdlib import EXCLUDED, Document, make_conversations, read_documents

SOURCE = '''\
"""A module."""


class Box:
    """Holds one thing.

    More about it that is no answer.
    """

    def open(self, key):
        """Open it with a key."""
        return self.thing if key else None

    def silent(self):
        return 1
'''


def test_documents_are_ordered_whole_and_partly_held_out() -> None:
    found = list(read_documents())
    names = [document.name for document in found]
    assert names == sorted(set(names)) and len(names) > 200
    assert not any(set(name.split("/")) & EXCLUDED for name in names)
    held_out = [document for document in found if document.held_out]
    assert held_out[0].name in names[:150]
    share = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in found)
    assert 0.01 < share < 0.15
    assert list(islice(read_documents(), 150)) == found[:150]


def test_questions_are_answered_by_docstrings_and_code() -> None:
    asked = {
        talk[0]["content"]: talk[1]["content"]
        for talk in make_conversations(Document("pkg/box.py", SOURCE, False))
    }
    assert asked == {
        "What does Box in pkg.box do?": "Holds one thing.",
        "What does open in pkg.box do?": "Open it with a key.",
        "Write open: Open it with a key.": "def open(self, key):\n"
        '    """Open it with a key."""\n'
        "    return self.thing if key else None",
    }


def test_sources_of_other_languages_ask_nothing() -> None:
    assert list(make_conversations(Document("old.py", "print 'python 2'", False))) == []
