"""`python -m lorakit`: what torchrun starts."""

from lorakit.cli import main

main()
