# What builders get to see: see ../regenerate_builder.py.
{ dump, text }:
let
  # Saves what it sees, then makes each of its outputs, whose paths are the arguments after the first.
  script = ''
    name=$1
    shift
    /bin/cp -r . ${dump}/$name.files
    /bin/cat /proc/$$/environ > ${dump}/$name.env
    /bin/cat /proc/$$/cmdline > ${dump}/$name.args
    for output in "$@"; do echo x > "$output"; done
  '';
  seen =
    name: attrs:
    derivation (
      {
        inherit name;
        system = builtins.currentSystem;
        builder = "/bin/sh";
        args = [ "-c" script "argument0" name ] ++ map placeholder (attrs.outputs or [ "out" ]);
      }
      // attrs
    );
  inner = builtins.toFile "inner" "inner";
  outer = builtins.toFile "outer" "outer ${inner}";
  made = derivation {
    name = "made";
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-c" "echo $out ${outer} > $out" ];
  };
  fixed = {
    outputHashAlgo = "sha256";
    outputHashMode = "flat";
    outputHash = builtins.hashString "sha256" "x\n";
  };
in
builtins.mapAttrs seen {
  plain = {
    text = "a b";
    empty = "";
    yes = true;
    no = false;
    list = [ "x" 1 ];
    "odd-name" = "1";
  };
  overriding = {
    PATH = "/my/path";
    HOME = "/my/home";
    NIX_STORE = "/my/store";
    NIX_BUILD_CORES = "77";
    NIX_BUILD_TOP = "/my/top";
    TMPDIR = "/my/tmp";
    PWD = "/my/pwd";
    NIX_LOG_FD = "9";
    TERM = "dumb";
    NIX_OUTPUT_CHECKED = "no";
  };
  passAsFile = {
    passAsFile = [ "bigText" "missing" "é" "shadowed" ];
    bigText = "text\nwith ${placeholder "out"}\n";
    "é" = "ü";
    shadowed = "content";
    shadowedPath = "the derivation's own";
  };
  multi.outputs = [ "out" "dev" ];
  fixed = fixed // {
    impureEnvVars = [ "SEEN_FROM_OUTSIDE" "not_set" "both" ];
    both = "from the derivation";
  };
  # Only where the hash of the output is known.
  impureIgnored = {
    impureEnvVars = [ "SEEN_FROM_OUTSIDE" ];
  };
  floating = {
    __contentAddressed = true;
    outputHashAlgo = "sha256";
    outputHashMode = "recursive";
    outputs = [ "out" "dev" ];
    mention = "${placeholder "dev"}/x";
    ${placeholder "out"} = "name";
    passAsFile = [ "inFile" ];
    inFile = placeholder "out";
  };
  graphs = {
    exportReferencesGraph = [ "one" outer "two.txt" "${made}/inside" ];
  };
  graphOfDrv = {
    exportReferencesGraph = [ "graph" made.drvPath ];
  };
  structured = {
    __structuredAttrs = true;
    outputs = [ "out" "dev" ];
    s = "it's \"quoted\" \\ é\n\t";
    t = true;
    f = false;
    nul = null;
    n = 3;
    negative = -4;
    large = 3000000000;
    whole = 1.0;
    fraction = 2.5;
    tiny = 0.00001;
    huge = 1.0e15;
    l = [ "a b" "c'd" 1 null false true ];
    el = [ ];
    nested = [ [ 1 ] ];
    lf = [ 1 2.5 ];
    e = { };
    o = { "y z" = 2; x = "1"; "it's" = null; };
    oo = { a = { b = 1; }; };
    "odd-name" = "x";
    PATH = "/my/path";
    passAsFile = [ "s" ];
    mention = placeholder "dev";
    exportReferencesGraph = { one = outer; several = [ inner made ]; };
    SEEN_FROM_OUTSIDE = "the derivation's own";
    impureEnvVars = [ "SEEN_FROM_OUTSIDE" ];
  };
  structuredFloating = {
    __structuredAttrs = true;
    __contentAddressed = true;
    outputHashAlgo = "sha256";
    outputHashMode = "recursive";
    mention = placeholder "out";
  };
  # An attribute of this name is taken for structured attributes as well; the text is not Nix's own.
  numbers = {
    __json = text;
  };
}
