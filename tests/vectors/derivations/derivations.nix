# The derivations of which Nix makes the vectors beside this file; see regenerate_derivations.py.
# Every derivation that another one uses is an attribute too. None is ever built.
let
  make = attributes: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // attributes);

  fixed = name: algo: mode: hash: make {
    inherit name;
    args = [ "-c" "printf hello > $out" ];
    outputHashAlgo = algo;
    outputHashMode = mode;
    outputHash = hash;
  };

  sha1Hello = "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d";
  sha256Hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

  # Two ways to the same contents: whoever uses one or the other has the same outputs.
  mirror = url: make {
    name = "mirror";
    inherit url;
    outputHashAlgo = "sha256";
    outputHash = sha256Hello;
  };

  chain = length: if length == 0 then all.leaf else make {
    name = "chain${toString length}";
    previous = chain (length - 1);
  };

  all = {
    # Input-addressed.
    leaf = make { name = "leaf"; args = [ "-c" "echo hi > $out" ]; FOO = "bar"; };
    bare = make { name = "bare"; };
    multi = make { name = "multi"; outputs = [ "out" "dev" ]; args = [ "-c" "echo o > $out; echo d > $dev" ]; };
    noOut = make { name = "no-out"; outputs = [ "lib" "bin" ]; };
    srcdep = let source = builtins.toFile "src.txt" "hello source\n"; in make {
      name = "srcdep";
      args = [ "-c" "read l < ${source}; echo \"$l ${source}\" > $out" ];
    };
    pathdep = make { name = "pathdep"; source = ./src.txt; };
    textdep = make { name = "textdep"; text = builtins.toFile "text" "see ${builtins.toFile "other" "x"}\n"; };
    two = make { name = "two"; args = [ "-c" "echo ${all.leaf} ${all.multi.dev} > $out" ]; };
    dep = make {
      name = "dep";
      args = [ "-c" "echo ${all.two} ${all.flat} ${all.recursive} ${all.multi} ${all.multi.dev} > $out" ];
    };
    chain1 = chain 1;
    chain2 = chain 2;
    chain3 = chain 3;
    wholeDrv = make { name = "whole-drv"; drv = builtins.unsafeDiscardOutputDependency all.two.drvPath; };
    closureDrv = make { name = "closure-drv"; drv = all.two.drvPath; };
    mirrorA = mirror "http://a.example/";
    mirrorB = mirror "http://b.example/";
    usesA = make { name = "uses-mirror"; input = all.mirrorA; };
    usesBoth = make { name = "uses-mirror"; input = [ all.mirrorA all.mirrorB ]; };
    # The same hash for two derivations that want different outputs of what is below.
    multiA = make { name = "multi-x"; outputs = [ "out" "dev" ]; input = all.mirrorA; };
    multiB = make { name = "multi-x"; outputs = [ "out" "dev" ]; input = all.mirrorB; };
    merged = make { name = "merged"; input = [ all.multiA.out all.multiB.dev ]; };
    oddName = make { name = "0?=_.+-Z"; };

    # Strings.
    esc = make {
      name = "esc";
      args = [ "-c" "exit 1" "tab\there" "nl\nhere" "cr\rhere" "q\"b\\d$e" "utf8-é-\${x}" ];
      A = "2"; Z = "3"; ZZ = ""; _u = "4"; a = "1"; "é" = "5";
    };
    escMore = make { name = "esc-more"; args = [ "\\\\\"" "" "\\" "\\n" ]; "q\"\\\n" = "6"; "🙂" = "7"; "￿" = "8"; };
    escapedBuilder = derivation { name = "escaped-builder"; system = "mips-\$(x) y"; builder = "/bin/\"s\\h\n"; };
    passAsFile = make { name = "pass-as-file"; passAsFile = [ "big" ]; big = "x y\n"; nothing = null; yes = true; no = false; n = -3; };
    structured = make {
      name = "sa";
      outputs = [ "out" "dev" ];
      __structuredAttrs = true;
      args = [ "-c" "exit 1" ];
      e = { };
      f = 1.0;
      fa = false;
      foo = { b = 1; a = [ 1 2.5 true null "x" ]; };
      l = [ "a b" "c'd" ];
      n = 3;
      nested = [ [ 1 ] ];
      nul = null;
      t = true;
      s = "q\"'é\n";
    };

    # Fixed.
    flat = fixed "flat" "sha256" "flat" sha256Hello;
    flat1 = fixed "flat1" "sha1" "flat" sha1Hello;
    flatMd5 = fixed "flat-md5" "md5" "flat" "5d41402abc4b2a76b9719d911017c592";
    flat512 = fixed "flat-512" "sha512" "flat"
      "sha512-m3HSJL1i83hdltRq0+o9czGb+8KJDKra4t/3JRlnPKcjI8PZm6XBHXx6zG4UuMXaDEZjR1wuXDre9G9zvN7AQw==";
    recursive = fixed "rec" "sha256" "recursive" "sha256-0zcHtBUmX4kuAjZCbr5S6BZAt7G22i9RH59CMJ3jYqo=";
    rec1 = fixed "rec1" "sha1" "recursive" sha1Hello;
    fixedWithInputs = make {
      name = "fixed-with-inputs";
      input = all.floating;
      outputHashAlgo = "sha256";
      outputHash = sha256Hello;
    };
    usesFixedWithInputs = make { name = "uses-fixed-with-inputs"; input = all.fixedWithInputs; };

    # Paths that are not known before the build.
    floating = make {
      name = "ca";
      args = [ "-c" "echo $out > $out" ];
      __contentAddressed = true;
      outputHashAlgo = "sha256";
      outputHashMode = "recursive";
    };
    floatingMulti = make {
      name = "ca-multi";
      outputs = [ "out" "dev" ];
      input = all.leaf;
      __contentAddressed = true;
      outputHashAlgo = "sha512";
      outputHashMode = "flat";
    };
    deferred = make { name = "cadep"; args = [ "-c" "echo ${all.floating} > $out" ]; };
    deferredTwice = make { name = "deferred-twice"; outputs = [ "out" "doc" ]; input = all.deferred; other = all.leaf; };
    impure = make { name = "impure"; __impure = true; outputHashAlgo = "sha256"; outputHashMode = "recursive"; };
  };

  describe = drv: {
    inherit (drv) drvPath;
    outputs = builtins.listToAttrs (map (name: { inherit name; value = drv.${name}.outPath; }) (drv.outputs or [ "out" ]));
  };
in
builtins.mapAttrs (name: describe) all
