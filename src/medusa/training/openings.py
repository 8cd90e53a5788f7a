"""How users begin what they say.

A model that is to write a user's turn after nothing but the opening of its chat template writes what it read most: a
model of code writes files of code, a model of two languages either, and few come to an end. After the first words of a
question it writes a question, in the language of these words. They are short and of many kinds, so that they decide
little. Two first turns in five are about programs. Models ask in other languages by prompts, see docs/training.md.
"""

from __future__ import annotations

import hashlib

FIRST = (
    "What is", "What are", "What does", "What would", "What's the best way to", "Which", "Who", "When did",
    "Where can", "Why do", "Why does", "Why is", "How do I", "How does", "How can I", "How many", "How would you",
    "Is it", "Is there", "Are there", "Does", "Should I", "Can you explain", "Can you help me", "Could you write",
    "Do you know", "If I", "If a", "I am", "I'm trying to", "I need", "I want to", "I have", "I've been", "My",
    "We are", "Our", "Explain", "Describe", "Define", "Tell me about", "Teach me", "Show me", "Give me", "Help me",
    "Please", "List", "Name", "Suggest", "Recommend", "Propose", "Compare", "Discuss", "Analyze", "Identify",
    "Summarize", "Rewrite", "Translate", "Convert", "Calculate", "Solve", "Prove", "Find", "Plan", "Design",
    "Develop", "Create a", "Draft", "Compose", "Write a", "Write an", "Write a short", "Write a poem",
    "Write a letter", "Write a story", "Imagine", "Suppose", "Pretend", "Act as", "You are", "Let's", "In", "A",
    "The", "For",
)  # fmt: skip
PROGRAMMING = (
    "Write a Python function that", "Write a Python function to", "Write a Python program", "Write a Python script",
    "Write a Python class", "Write a Python decorator", "Write a Python generator", "Write a recursive function",
    "Write a JavaScript function that", "Write a TypeScript", "Write a Java method", "Write a Java class",
    "Write a C function", "Write a C program", "Write a C++ function", "Write a C++ program", "Write a C++ class",
    "Write a C# method", "Write a Go function", "Write a Rust function", "Write a Kotlin", "Write a Swift function",
    "Write a Ruby method", "Write a PHP function", "Write an R script", "Write a Haskell function", "Write a Lua",
    "Write a Bash script", "Write a shell command", "Write a PowerShell", "Write a SQL query",
    "Write a SQL statement", "Write a regular expression", "Write an HTML page", "Write a CSS rule",
    "Write a Dockerfile", "Write a Makefile", "Write a unit test", "Write tests for", "Write a REST API",
    "Write a command line tool", "Write a simple parser", "Write an algorithm", "Write pseudocode",
    "Write a YAML file", "Write a JSON schema", "Write a docstring", "Implement a function", "Implement a class",
    "Implement a stack", "Implement a queue", "Implement a linked list", "Implement a binary search",
    "Implement a hash table", "Implement a cache", "Implement a graph", "Implement an", "Implement the",
    "Complete this function", "Complete the following code", "Fix this code", "Fix the bug in",
    "Find the error in this", "Debug this", "Refactor this", "Optimize this", "Simplify this code",
    "Explain this code", "What does this code do", "What is wrong with this", "What will this print",
    "Why does this code", "Why is my code", "Why do I get", "My program", "My code", "My function", "My query",
    "I get an error", "I have a list of", "I have a function", "I have a class", "I have a table", "I have a string",
    "I have a DataFrame", "I have an array", "I want to write a program", "I need a script", "I need a function that",
    "Given a list of", "Given a string", "Given an array", "Given two", "Given a table", "Given a binary tree",
    "In Python, how do I", "In Python, what is", "In JavaScript, how do I", "In Java, how can I", "In C++, what is",
    "In C, how do I", "In Go, how do I", "In Rust, what", "In SQL, how do I", "In Git, how do I",
    "In Linux, how do I", "In React, how do I", "In pandas,", "In NumPy,", "Using Python,", "Using SQL,",
    "Using only the standard library,", "Using recursion,", "How do I read a file", "How do I sort", "How do I parse",
    "How do I convert a", "How do I call", "How do I test", "How do I use", "How do I fix", "How can I speed up",
    "How can I merge", "How can I remove duplicates", "How does a compiler", "How does garbage collection",
    "How does a hash map", "How does async", "How would you design a", "What is the time complexity",
    "What is the difference between", "What is a pointer", "What is a closure", "What is dependency",
    "What is the purpose of", "What are the SOLID", "What are the advantages of", "Convert this",
    "Translate this code", "Create a function", "Create a class", "Create a table", "Create a web page",
    "Create a React", "Create a simple game", "Create a Flask", "Build a simple", "Add comments to",
    "Add error handling to", "Add a method", "Show an example of", "Show how to", "Generate a list of",
    "Generate random", "Check whether a", "Count the number of", "Reverse a", "Sort a list", "Print the",
    "Calculate the sum", "Compute the", "Merge two", "Remove all", "Read a CSV", "Sum the", "Validate an",
    "Define a function", "Define a class", "Describe the algorithm", "Explain how to use",
    "Explain the difference between", "Explain recursion", "Compare Python and", "Which data structure",
    "Which library", "Is it possible to", "Can you write a function", "Can you fix", "Can you optimize",
    "Could you explain this",
)  # fmt: skip
LATER = (
    "Why", "Why is", "How", "How does", "How would", "What about", "What if", "What is", "What does", "Which", "Who",
    "Is there", "Is that", "Are there", "Does", "Can you", "Could you", "Can you explain", "Would it", "And", "But",
    "So", "Now", "Thanks! Now", "Okay, but", "I don't understand", "I think", "I also", "Please", "Give me",
    "Show me", "Give an example of", "Add", "Change", "Make it", "Rewrite", "Explain", "Summarize", "Write",
    "Tell me more about",
)  # fmt: skip


def opening(seed: int, turn: int) -> str:
    """The first words of user turn number `turn`."""
    programs = seed % 5 < 2  # two conversations in five: what users ask of models of code, and of others often
    openings = LATER if turn else PROGRAMMING if programs else FIRST
    return openings[seed // 5 % len(openings)]


def digest() -> str:
    """Changes with the words, and with how they are used: texts of two digests do not go into one file."""
    return hashlib.sha256("\n".join(("2", *FIRST, "", *PROGRAMMING, "", *LATER)).encode()).hexdigest()[:16]
