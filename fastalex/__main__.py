from fastalex.cli import main

main()
