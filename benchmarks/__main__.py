"""Run every benchmark."""

from benchmarks.compile_speed import main

if __name__ == "__main__":
    main()
