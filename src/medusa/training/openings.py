"""How users begin what they say.

A model that is to write a user's turn after nothing but the opening of its chat template writes what it read most: a
model of code writes files of code, a model of two languages either, and few come to an end. After the first words of a
question it writes a question, in the language of these words. They are short and of many kinds, so that they decide
little. Models ask in other languages by prompts, see docs/training.md.
"""

from __future__ import annotations

import hashlib

FIRST = (
    "What is", "What are", "What does", "What would", "What's the best way to", "Which", "Who", "When did", "Where can",
    "Why do", "Why does", "Why is", "How do I", "How does", "How can I", "How many", "How would you", "Is it",
    "Is there", "Are there", "Does", "Should I", "Can you explain", "Can you help me", "Could you write", "Do you know",
    "If I", "If a", "I am", "I'm trying to", "I need", "I want to", "I have", "I've been", "My", "We are", "Our",
    "Explain", "Describe", "Define", "Tell me about", "Teach me", "Show me", "Give me", "Help me", "Please", "List",
    "Name", "Suggest", "Recommend", "Propose", "Compare", "Discuss", "Analyze", "Identify", "Summarize", "Rewrite",
    "Translate", "Convert", "Calculate", "Solve", "Prove", "Find", "Plan", "Design", "Develop", "Create a", "Draft",
    "Compose", "Write a", "Write an", "Write a short", "Write a Python function", "Write code", "Imagine", "Suppose",
    "Pretend", "Act as", "You are", "Let's", "In", "A", "The", "For",
)  # fmt: skip
LATER = (
    "Why", "Why is", "How", "How does", "How would", "What about", "What if", "What is", "What does", "Which", "Who",
    "Is there", "Is that", "Are there", "Does", "Can you", "Could you", "Can you explain", "Would it", "And", "But",
    "So", "Now", "Thanks! Now", "Okay, but", "I don't understand", "I think", "I also", "Please", "Give me", "Show me",
    "Give an example of", "Add", "Change", "Make it", "Rewrite", "Explain", "Summarize", "Write", "Tell me more about",
)  # fmt: skip


def opening(seed: int, turn: int) -> str:
    """The first words of user turn number `turn`."""
    openings = LATER if turn else FIRST
    return openings[seed % len(openings)]


def digest() -> str:
    """Changes with the words, and with how they are used: texts of two digests do not go into one file."""
    return hashlib.sha256("\n".join(("1", *FIRST, "", *LATER)).encode()).hexdigest()[:16]
