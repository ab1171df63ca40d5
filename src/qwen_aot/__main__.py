"""`python -m qwen_aot` is `qwen-aot`, also where no script of it is on the path."""

from qwen_aot.runtime.cli.main import main

if __name__ == "__main__":
    main()
