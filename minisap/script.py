"""What every script shares: how it ends when its input is wrong, and how it draws."""
import sys


def run(main, interrupted="interrupted"):
    """Call main(). What is wrong with its input becomes one line on stderr and exit status 2; Ctrl-C says `interrupted`."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)


def pyplot():
    """matplotlib without a screen; ValueError where it is not installed. To be called before the work that is to be drawn."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot
