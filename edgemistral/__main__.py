"""python -m edgemistral"""

from edgemistral.cli import main

main(prog_name="edgemistral")
