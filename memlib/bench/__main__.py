from memlib.bench.measure import main

if __name__ == "__main__":
    main()
