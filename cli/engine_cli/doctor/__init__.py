"""What `engines doctor` looks at, a module a subject. In each a pure judge makes a Finding of
facts, and a check gets the facts.

Modules import `registry` where they use it, not at their top: that `registry` cannot be imported is
one of the findings.
"""
