# What the tests build with real Nix and with ours: attributes by how it should end.
let
  recipe = name: script: attrs: derivation ({
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-c" script ];
  } // attrs);
  floating = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  flat = hash: { outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = hash; };
  recursive = hash: { outputHashMode = "recursive"; outputHashAlgo = "sha256"; outputHash = hash; };
  hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
  zeros = "0000000000000000000000000000000000000000000000000000000000000000";
  # Where a builder with structured attributes finds its output.
  copyTo = file: "cp ${file} $(sed 's/.*\"outputs\":{\"out\":\"\\([^\"]*\\)\".*/\\1/' .attrs.json)";
  low = builtins.toFile "low" "low";
  high = builtins.toFile "high" "see ${low}";
in rec {
  # One at a time, as BuildDerivation has them: without input derivations.
  leaf = recipe "leaf" "echo hi > $out; echo said; echo more >&2" { FOO = "bar"; };
  multi = recipe "multi" "echo $two $out > $out; mkdir $two; ln -s nowhere/$two $two/link" { outputs = [ "out" "two" ]; };
  tree = recipe "tree" ''
    mkdir -p $out/a/b $out/empty; echo x > $out/a/run; chmod 4751 $out/a/run; echo y > $out/a/plain; chmod 600 $out/a/plain
    ln $out/a/plain $out/a/hard; ln -s /etc/passwd $out/a/b/link; : > $out/a/b/nothing; chmod 700 $out/empty
  '' { };
  link = recipe "link" "ln -s $out/itself $out" { };
  environment = recipe "environment" "set > $out" { PATH = "/elsewhere"; HOME = "/home"; empty = ""; lines = "a\nb"; };
  machine = recipe "machine" ''
    { id -u; id -g; hostname; pwd; umask; ulimit -c; cat /etc/passwd /etc/group /etc/hosts; ls /; ls /etc /dev /nix;
      ls -a /build; cat /proc/sys/kernel/domainname; cat /proc/self/personality; ls /sys/class 2>&1; echo $$; tty; } > $out 2>&1; true
  '' { };
  sources = recipe "sources" "cat ${high} > $out; ls /nix/store | grep -v sources >> $out" { };
  asFile = recipe "asFile" "cat $bigPath $smallPath > $out; echo $bigPath $passAsFile \${big-unset} >> $out" {
    passAsFile = [ "big" "small" "missing" ];
    big = "a b\n$c";
    small = "";
  };
  graph = recipe "graph" "cat one two > $out" { exportReferencesGraph = [ "one" high "two" low ]; };
  structured = recipe "structured" "cat .attrs.json .attrs.sh > x; env | grep -v ATTRS >> x; ${copyTo "x"}" {
    __structuredAttrs = true;
    text = "it's \"é\"\n";
    numbers = [ 1 2.5 (-3) 3000000000 ];
    nested = { a = [ 1 ]; b = null; };
    flags = { yes = true; no = false; };
    list = [ "a b" "c'd" 1 true null ];
  };
  structuredGraph = recipe "structuredGraph" (copyTo ".attrs.json") {
    __structuredAttrs = true;
    exportReferencesGraph.both = [ high low ];
  };
  fixedFlat = recipe "fixedFlat" "printf hello > $out; echo $NIX_OUTPUT_CHECKED" (flat hello);
  fixedRecursive = recipe "fixedRecursive" "printf hello > $out"
    (recursive "sha256-CkMIecJm+LV/QJKg+TXPP6zUi7zN5XYNR0jKQFFx6Wk=");
  fixedSha1 = recipe "fixedSha1" "printf hello > $out" {
    outputHashMode = "flat";
    outputHashAlgo = "sha1";
    outputHash = "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d";
  };
  fixedEnvironment = recipe "fixedEnvironment" "ls /etc > $out; exit 0" (flat zeros);
  floatingSelf = recipe "floatingSelf" "echo $out > $out" floating;
  floatingPlain = recipe "floatingPlain" "mkdir $out; echo ${high} > $out/f" floating;
  floatingMulti = recipe "floatingMulti" "echo $b $out > $out; mkdir $a; echo $a > $a/f; ln -s $a $b"
    (floating // { outputs = [ "out" "a" "b" ]; });
  floatingFlat = recipe "floatingFlat" "echo x > $out" (floating // { outputHashMode = "flat"; });
  carriageReturns = recipe "carriageReturns" "printf 'abc\\rX\\nlast'; echo > $out" { };

  slow = recipe "slow" "echo started; sleep 2; echo > $out" { };

  # Failures.
  exitCode = recipe "exitCode" "echo bye; exit 3" { };
  missing = recipe "missing" "echo > $out" { outputs = [ "out" "dev" ]; };
  writable = recipe "writable" "echo > $out; chmod 666 $out" { };
  groupWritable = recipe "groupWritable" "mkdir $out; chmod 775 $out" { };
  cycle = recipe "cycle" "echo $two > $out; echo $out > $two" { outputs = [ "out" "two" ]; };
  longCycle = recipe "longCycle" "echo $b > $a; echo $c > $b; echo $a > $c; echo > $out" { outputs = [ "out" "a" "b" "c" ]; };
  references = recipe "references" "echo ${low} $out > $out" { allowedReferences = [ ]; };
  requisites = recipe "requisites" "echo ${high} $out > $out" { allowedRequisites = [ high ]; };
  disallowed = recipe "disallowed" "echo ${high} > $out" { disallowedRequisites = [ low ]; };
  disallowedOutput = recipe "disallowedOutput" "echo > $dev; echo $dev > $out" {
    outputs = [ "out" "dev" ];
    disallowedReferences = [ "dev" ];
  };
  illegal = recipe "illegal" "echo > $out" { allowedReferences = [ "nope" ]; };
  tooLarge = recipe "tooLarge" (copyTo ".attrs.json") {
    __structuredAttrs = true;
    outputChecks.out.maxSize = 10;
  };
  wrongFlat = recipe "wrongFlat" "printf hello > $out" (flat zeros);
  wrongRecursive = recipe "wrongRecursive" "mkdir $out; echo x > $out/f" (recursive zeros);
  flatDirectory = recipe "flatDirectory" "mkdir $out" (flat zeros);
  flatExecutable = recipe "flatExecutable" "printf hello > $out; chmod +x $out" (flat hello);
  fixedFailing = recipe "fixedFailing" "exit 1" (flat hello);
  platform = recipe "platform" "" { system = "z80-cpm"; };
  features = recipe "features" "" { requiredSystemFeatures = [ "magic" "kvm" ]; };
  silence = recipe "silence" "echo a; sleep 30" { outputs = [ "out" "dev" ]; };
  timeout = recipe "timeout" "while :; do echo a; sleep 0.1; done" { };
  logLimit = recipe "logLimit" "while :; do echo aaaaaaaaaaaaaaaaaaaaaaaaa; done" { };

  # Several, as BuildPaths has them.
  base = recipe "base" "echo base > $out; echo dev > $dev" { outputs = [ "out" "dev" ]; };
  middle = recipe "middle" "cat ${base.dev} > $out; echo ${base.dev} >> $out" { };
  top = recipe "top" "echo ${middle} ${base} ${fixedFlat} > $out; ls /nix/store | grep -v top >> $out" { };
  usesFloating = recipe "usesFloating" "cat ${floatingSelf} > $out" { };
  usesFloatingToo = recipe "usesFloatingToo" "echo ${floatingSelf} ${base} > $out" floating;
  fixedFromFloating = recipe "fixedFromFloating" "x=$(cat ${floatingSelf}); printf hello > $out" (recursive "sha256-CkMIecJm+LV/QJKg+TXPP6zUi7zN5XYNR0jKQFFx6Wk=");
  onFailing = recipe "onFailing" "cat ${exitCode} > $out" { };
  onMismatch = recipe "onMismatch" "cat ${wrongFlat} > $out" { };
}
